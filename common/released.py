"""Reads the Lightning checkpoints that the authors of FLM released, without running code from them."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.errors import UserError, first_line

# Parts of the official names (after "backbone.") -> ours, replaced in this order.
_NAMES = {
    "vocab_embed.embedding": "embed", "sigma_map.": "times.0.", "sigma_map_prime.": "times.1.", "attn_": "",
    "adaLN_modulation": "modulation", "norm_final": "norm", "output_layer.linear": "output", "output_layer.": "",
}  # fmt: skip
_BUFFERS = ("rotary_emb.inv_freq",)  # in the state dict, but no parameters: not among the averaged weights
_IGNORED = "learnable_loss_weighting."  # weighs the training loss, no part of the network


class _Inert:
    """Stands in for every class of the checkpoint that is no tensor: takes anything, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def load_released(path: Path, net: nn.Module) -> None:
    """Loads the averaged weights of the official checkpoint `path` into our DiT `net`.

    Averaged weights are a list without names: they are matched to the parameters of the state dict in order, and every
    name and shape must fit `net`. Raises UserError if the file cannot be read or does not fit.
    """
    if not path.is_file():
        raise UserError(f"{path} is no regular file; give the .ckpt of a released FLM checkpoint")
    try:
        # Configuration objects of other packages become inert; only tensors and plain containers are rebuilt.
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(_Inert, name) for name in names]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        state, averaged = content["state_dict"], content["ema"]["shadow_params"]
    except Exception as error:  # file, archive and unpickler have exceptions of their own
        raise UserError(
            f"{path} is no released FLM checkpoint ({first_line(error)}); expected Lightning's .ckpt, wholly downloaded"
        ) from error
    parameters = {
        key.removeprefix("backbone.").replace("_orig_mod.", ""): value
        for key, value in state.items()
        if key.startswith("backbone.") and not key.endswith(_BUFFERS)
    }
    if len(averaged) != len(parameters):
        raise UserError(f"{path}: {len(averaged)} averaged weights for {len(parameters)} parameters; unknown version")
    ours = {}
    for (name, value), average in zip(parameters.items(), averaged, strict=True):
        if average.shape != value.shape:
            raise UserError(f"{path}: {name} has another shape than its averaged weights; unknown version")
        if not name.startswith(_IGNORED):
            for theirs, our in _NAMES.items():
                name = name.replace(theirs, our)
            ours[name] = average
    times, layers = (len({key.split(".")[1] for key in ours if key.startswith(k)}) for k in ("times.", "blocks."))
    if times > len(net.times):
        raise UserError(f"{path} is a flow map (two times); evaluate it with fmlm_distill.py")
    if times < len(net.times):
        raise UserError(f"{path} is a flow (one time); evaluate it with flm_train.py, or give it as --teacher")
    if layers != len(net.blocks):
        raise UserError(f"{path} has {layers} layers, the network here {len(net.blocks)}; set --layers {layers}")
    try:
        net.load_state_dict(ours)
    except RuntimeError as error:  # its second line names the first difference
        raise UserError(
            f"{path}: {str(error).splitlines()[1].strip()} Give a released checkpoint, its --data lm1b or openwebtext, "
            "and no other --tokenizer (vocabulary), --width or --cond-width"
        ) from error
