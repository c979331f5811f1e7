"""Opens a file of weights for its encoder, whether or not a decoder comes with it."""

from pathlib import Path

from mae_core.model import MaskedAutoencoder
from mae_core.weights import _HEADS, _agreed, _depth, _image_size, _mlp_ratio, _read, load_official, load_state

_DECODER = ("decoder_", "mask_token")


def load_weights(
    path: str | Path,
    *,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    normalize_pixels: bool = False,
) -> tuple[MaskedAutoencoder, bool]:
    """Builds a model from a full checkpoint in the official layout, or from an encoder alone under timm's keys.

    Args:
        path: A ``.pth`` file or ``.safetensors``, as ``weights.load_official`` takes it.
        num_heads: Encoder heads; None: as the file says, else by the width.
        decoder_num_heads: Decoder heads; None: as the file says, else the paper's 16.
        normalize_pixels: Whether the checkpoint was trained on normalised pixels; no shape tells.

    Returns:
        The model on the current default device, and whether the file has a decoder. Where it has none, the
        model's own is a stub without blocks, drawn at random.

    Raises:
        ValueError: No checkpoint, keys or shapes of another model, or heads that do not fit.
        OSError: The file cannot be opened.
    """
    path = Path(path)
    state, known = _read(path)
    if "cls_token" not in state or any(name.startswith(_DECODER) for name in state):
        if decoder_num_heads is None:
            decoder_num_heads = written if isinstance(written := known.get("decoder_num_heads"), int) else 16
        model = load_official(
            path, num_heads=num_heads, decoder_num_heads=decoder_num_heads, normalize_pixels=normalize_pixels
        )
        return model, True
    needed = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4, "blocks.0.mlp.fc1.weight": 2}
    for name, ndim in needed.items():
        if name not in state or state[name].ndim != ndim:
            found = list(state[name].shape) if name in state else "missing"
            raise ValueError(f"{path} is no encoder under timm's keys: {name} is {found}, expected {ndim} dimensions")
    width, patch = state["cls_token"].shape[-1], state["patch_embed.proj.weight"].shape
    if num_heads is None:
        num_heads = written if isinstance(written := known.get("num_heads"), int) else _HEADS.get(width, width // 64)
    num_heads = _agreed("num_heads", num_heads, known.get("num_heads"), path)
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"{path}: {num_heads} heads do not divide the encoder's width {width}: pass num_heads")
    model = MaskedAutoencoder(
        image_size=_image_size(state["pos_embed"].shape[1] - 1, patch[-1], known.get("image_size"), path),
        patch_size=patch[-1],
        channels=patch[1],
        width=width,
        depth=_depth(state, "blocks"),
        num_heads=num_heads,
        mlp_ratio=_mlp_ratio(state, width),
        decoder_width=4,
        decoder_depth=0,
        decoder_heads=1,
        normalize_pixels=normalize_pixels,
    )
    stub = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(_DECODER)}
    try:
        load_state(model, state | stub)
    except ValueError as error:
        raise ValueError(f"{path} is no encoder under timm's keys: {error}") from error
    return model, False
