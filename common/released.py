"""Reads the Lightning checkpoints that the authors of FLM released, without running code from them."""

import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError, first_line

# Official names (after "backbone.") -> ours; in the order of their module, which is that of the averaged weights.
_NAMES = (
    (r"vocab_embed\.embedding", "embed"),
    (r"sigma_map\.(mlp\..*)", r"times.0.\1"),
    (r"sigma_map_prime\.(mlp\..*)", r"times.1.\1"),
    (r"blocks\.(\d+)\.attn_qkv\.(.*)", r"blocks.\1.qkv.\2"),
    (r"blocks\.(\d+)\.attn_out\.(.*)", r"blocks.\1.out.\2"),
    (r"blocks\.(\d+)\.adaLN_modulation\.(.*)", r"blocks.\1.modulation.\2"),
    (r"(blocks\.\d+\.(?:norm1|norm2|mlp\.[02])\..*)", r"\1"),
    (r"output_layer\.norm_final\.(.*)", r"norm.\1"),
    (r"output_layer\.linear\.(.*)", r"output.\1"),
    (r"output_layer\.adaLN_modulation\.(.*)", r"modulation.\1"),
)
_BUFFERS = ("rotary_emb.inv_freq",)  # in the state dict, but no parameters: not among the averaged weights
_IGNORED = "learnable_loss_weighting."  # weighs the training loss, no part of the network


class _Inert:
    """Stands in for every class of the checkpoint that is no tensor: takes anything, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def load_released(path: Path, net: nn.Module) -> int:
    """Loads the averaged weights of the official checkpoint `path` into our DiT `net`; returns its training step.

    Averaged weights are a list without names: they are matched to the parameters of the state dict in order, and every
    name and shape must fit `net`. Raises UserError if the file cannot be read or does not fit.
    """
    try:
        # Configuration objects of other packages become inert; only tensors and plain containers are rebuilt.
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(_Inert, name) for name in names]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        state, averaged = content["state_dict"], content["ema"]["shadow_params"]
    except (OSError, RuntimeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path} is no released FLM checkpoint ({first_line(error)}); expected Lightning's .ckpt"
        ) from error
    except Exception as error:  # the unpickler's own errors have no common class
        raise UserError(f"{path} cannot be read ({first_line(error)}); download it again") from error
    parameters = OrderedDict(
        (key.removeprefix("backbone.").replace("_orig_mod.", ""), value)
        for key, value in state.items()
        if key.startswith("backbone.") and not key.endswith(_BUFFERS)
    )
    if len(averaged) != len(parameters):
        raise UserError(
            f"{path}: {len(averaged)} averaged weights for {len(parameters)} parameters; not a known version"
        )
    ours = {}
    for (name, value), average in zip(parameters.items(), averaged, strict=True):
        if average.shape != value.shape:
            raise UserError(
                f"{path}: averaged weights of {name} have another shape than its weights; not a known version"
            )
        if not name.startswith(_IGNORED):
            ours[_rename(name, path)] = average
    _check_fit(ours, net.state_dict(), path)
    net.load_state_dict(ours)
    return int(content.get("global_step", 0))


def _rename(name: str, path: Path) -> str:
    for pattern, new in _NAMES:
        if match := re.fullmatch(pattern, name):
            return match.expand(new)
    raise UserError(f"{path}: unknown parameter {name}; not a released FLM or FMLM checkpoint")


def _check_fit(have: dict[str, Tensor], want: dict[str, Tensor], path: Path) -> None:
    """Raises UserError that names the setting behind the first difference."""
    flags = {"embed": ("--tokenizer (vocabulary) and --width"), "times.0.mlp.0.weight": "--cond-width"}
    if "times.1.mlp.0.weight" in have and "times.1.mlp.0.weight" not in want:
        raise UserError(f"{path} is a flow map (two times); evaluate it with fmlm_distill.py")
    if "times.1.mlp.0.weight" in want and "times.1.mlp.0.weight" not in have:
        raise UserError(f"{path} is a flow (one time); evaluate it with flm_train.py, or give it as --teacher")
    layers = [1 + max(int(k.split(".")[1]) for k in d if k.startswith("blocks.")) for d in (have, want)]
    if layers[0] != layers[1]:
        raise UserError(f"{path} has {layers[0]} layers, the network here {layers[1]}; set --layers {layers[0]}")
    for name in want:
        if name not in have or have[name].shape != want[name].shape:
            found = tuple(have[name].shape) if name in have else "missing"
            hint = flags.get(name, "the settings of --data lm1b or openwebtext")
            raise UserError(f"{path}: {name} is {found}, here {tuple(want[name].shape)}; check {hint}")
    if extra := sorted(have.keys() - want.keys()):
        raise UserError(f"{path} has parameters the network here lacks: {', '.join(extra[:3])}")
