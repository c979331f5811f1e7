"""Opens a file of weights for its encoder, whether or not a decoder comes with it."""

from pathlib import Path
from typing import Literal

from mae_core.model import MaskedAutoencoder
from mae_core.weights import _read, encoder_sizes, has_decoder, load_official, load_state, official_state


def load_weights(
    path: str | Path,
    *,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    target: Literal["raw", "normalized"] = "raw",
) -> tuple[MaskedAutoencoder, bool]:
    """Builds a model from a full checkpoint in the official layout, or from an encoder alone under timm's keys.

    Args:
        path: A ``.pth`` file or ``.safetensors``, as ``weights.load_official`` takes it.
        num_heads: Encoder heads; None: as the file says, else by the width.
        decoder_num_heads: Decoder heads; None: as the file says, else the paper's 16.
        target: What the checkpoint was trained on, as ``weights.load_official`` takes it.

    Returns:
        The model on the current default device, and whether the file has a decoder. Where it has none, the
        model's own is a stub without blocks, drawn at random.

    Raises:
        ValueError: No checkpoint, keys or shapes of another model, or heads that do not fit.
        OSError: The file cannot be opened.
    """
    path = Path(path)
    state, known = _read(path)
    if "cls_token" not in state or has_decoder(state):
        if decoder_num_heads is None:
            decoder_num_heads = written if isinstance(written := known.get("decoder_num_heads"), int) else 16
        model = load_official(path, num_heads=num_heads, decoder_num_heads=decoder_num_heads, target=target)
        return model, True
    needed = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4, "blocks.0.mlp.fc1.weight": 2}
    for name, ndim in needed.items():
        if name not in state or state[name].ndim != ndim:
            found = list(state[name].shape) if name in state else "missing"
            raise ValueError(f"{path} is no encoder under timm's keys: {name} is {found}, expected {ndim} dimensions")
    sizes = encoder_sizes(state, known, num_heads, path)
    model = MaskedAutoencoder(**sizes, decoder_width=4, decoder_depth=0, decoder_heads=1, target=target)
    stub = {name: tensor for name, tensor in official_state(model).items() if has_decoder({name: tensor})}
    try:
        load_state(model, state | stub)
    except ValueError as error:
        raise ValueError(f"{path} is no encoder under timm's keys: {error}") from error
    return model, False
