"""common/released.py on a checkpoint with the official names and shapes, made here: the real files are not at hand."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import flm_train as flm
import fmlm_distill as fmlm
from common import cli
from common.errors import UserError
from common.released import load_released

SMALL = dict(layers=2, width=32, heads=2, cond_width=16, length=6)
M = cli.override(flm.Args(), SMALL | dict(conv=0, self_condition=0.0)).model  # the network of the paper
V, D, C = 11, 32, 16


@dataclass
class Config:
    """A class of the checkpoint's own, as the configuration in the real files."""

    name: str = "flm"


class Reader:
    """Would run code if it were unpickled."""

    def __reduce__(self) -> tuple:
        return print, ("code of the checkpoint ran",)


def official(times: int, layers: int = 2, weighting: bool = False) -> dict:
    shapes = {"vocab_embed.embedding": (V, D)}
    for name in ("sigma_map", "sigma_map_prime")[:times]:
        shapes |= {f"{name}.mlp.0.weight": (C, 256), f"{name}.mlp.0.bias": (C,)}
        shapes |= {f"{name}.mlp.2.weight": (C, C), f"{name}.mlp.2.bias": (C,)}
    shapes["rotary_emb.inv_freq"] = (8,)
    if weighting:
        shapes["learnable_loss_weighting.mlp.0.weight"] = (C, C)
    for i in range(layers):
        b = f"blocks.{i}."
        shapes |= {b + "norm1.weight": (D,), b + "attn_qkv.weight": (3 * D, D), b + "attn_out.weight": (D, D)}
        shapes |= {b + "norm2.weight": (D,), b + "mlp.0.weight": (4 * D, D), b + "mlp.0.bias": (4 * D,)}
        shapes |= {b + "mlp.2.weight": (D, 4 * D), b + "mlp.2.bias": (D,)}
        shapes |= {b + "adaLN_modulation.weight": (6 * D, C), b + "adaLN_modulation.bias": (6 * D,)}
    o = "output_layer."
    shapes |= {o + "norm_final.weight": (D,), o + "linear.weight": (V, D), o + "linear.bias": (V,)}
    shapes |= {o + "adaLN_modulation.weight": (2 * D, C), o + "adaLN_modulation.bias": (2 * D,)}
    state = {f"backbone.{k}": torch.randn(v) for k, v in shapes.items()}
    averaged = [torch.randn(v) for k, v in shapes.items() if k != "rotary_emb.inv_freq"]
    return {
        "state_dict": state, "ema": {"decay": 0.9999, "num_updates": 5, "shadow_params": averaged},
        "global_step": 550_000, "hyper_parameters": {"config": Config(), "reader": Reader()},
    }  # fmt: skip


def saved(folder: Path, content: dict) -> Path:
    torch.save(content, folder / "official.ckpt")
    return folder / "official.ckpt"


@pytest.mark.parametrize("weighting", [False, True])
def test_load_released_gives_averaged_weights_our_names(
    tmp_path: Path, capsys: pytest.CaptureFixture, weighting: bool
) -> None:
    content = official(times=2, weighting=weighting)
    net = fmlm.DiT(M, V, times=2)
    load_released(saved(tmp_path, content), net)
    assert "code of the checkpoint ran" not in capsys.readouterr().out
    names = [k for k in content["state_dict"] if not k.endswith("inv_freq")]
    average = dict(zip(names, content["ema"]["shadow_params"], strict=True))
    for theirs, ours in (
        ("backbone.vocab_embed.embedding", net.embed),
        ("backbone.sigma_map.mlp.2.bias", net.times[0].mlp[2].bias),
        ("backbone.sigma_map_prime.mlp.0.weight", net.times[1].mlp[0].weight),
        ("backbone.blocks.1.attn_qkv.weight", net.blocks[1].qkv.weight),
        ("backbone.blocks.0.attn_out.weight", net.blocks[0].out.weight),
        ("backbone.blocks.0.adaLN_modulation.bias", net.blocks[0].modulation.bias),
        ("backbone.blocks.1.mlp.2.weight", net.blocks[1].mlp[2].weight),
        ("backbone.output_layer.norm_final.weight", net.norm.weight),
        ("backbone.output_layer.linear.bias", net.output.bias),
        ("backbone.output_layer.adaLN_modulation.weight", net.modulation.weight),
    ):
        assert torch.equal(average[theirs], ours)


def test_load_released_says_in_one_line_what_does_not_fit(tmp_path: Path) -> None:
    def error(content: object, net: nn.Module) -> str:
        with pytest.raises(UserError) as caught:
            load_released(saved(tmp_path, content), net)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    one = flm.DiT(M, V)
    assert "flow map (two times)" in error(official(2), one)
    assert "flow (one time)" in error(official(1), fmlm.DiT(M, V, times=2))
    assert "set --layers 3" in error(official(1, layers=3), one)
    assert "vocabulary" in error(official(1), flm.DiT(M, V + 1))
    assert "no released FLM checkpoint" in error({"weights": torch.zeros(1)}, one)
    short = official(1)
    short["ema"]["shadow_params"].pop()
    assert "averaged weights for" in error(short, one)
    swapped = official(1)
    swapped["ema"]["shadow_params"].reverse()
    assert "another shape" in error(swapped, one)
    unknown = official(1)
    unknown["state_dict"]["backbone.extra"] = torch.zeros(1)
    unknown["ema"]["shadow_params"].append(torch.zeros(1))
    assert 'Unexpected key(s) in state_dict: "extra"' in error(unknown, one)
    (tmp_path / "official.ckpt").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"no released FLM checkpoint|cannot be read"):
        load_released(tmp_path / "official.ckpt", one)
    os.mkfifo(tmp_path / "pipe.ckpt")  # reading would wait for ever
    with pytest.raises(UserError, match="is no regular file"):
        load_released(tmp_path / "pipe.ckpt", one)
