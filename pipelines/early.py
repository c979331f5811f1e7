"""What is wrong with a command and known at once: before PyTorch, timm and Ray, which take seconds to import."""

import contextlib
import ctypes
import os
from pathlib import Path

from mae_core.architectures import check_name, check_patches, patch_size, vit_names
from pipelines.config import Config, Scale
from pipelines.errors import UserError


def check_early(config: Config) -> None:
    """Holds a pretraining configuration against what is known at once: architecture, patches, GPUs.

    Raises:
        UserError: Something does not fit.
    """
    check_shape(config)
    check_gpus(config.scale)


def check_shape(config: Config) -> None:
    """Sees that timm has the architecture, and that its patches cut the images, as far as names say.

    Raises:
        UserError: One of it is not so.
    """
    arch = config.model.arch
    side = config.model.patch_size or patch_size(arch)
    try:
        if names := vit_names():
            check_name(arch, names)
        if side:
            check_patches(config.data.image_size, side)
    except ValueError as error:
        raise UserError(f"model: {error}") from None


def check_gpus(scale: Scale) -> None:
    """Sees that this machine has the GPUs that a run asks for, where it is to run here.

    Raises:
        UserError: It has too few.
    """
    if not scale.gpu or scale.address or os.environ.get("RAY_ADDRESS"):
        return
    num, wanted = num_gpus(), scale.workers * scale.gpus_per_worker
    if num is not None and num < wanted:
        raise UserError(f"scale.gpu asks for {wanted:g} GPUs; there are {num}")


def num_gpus() -> int | None:
    """GPUs that this process may use; None: there are some that NVIDIA's library does not count."""
    if Path("/dev/kfd").exists():
        return None  # AMD's
    num = ctypes.c_uint(0)
    # Where the driver is not there, so is its library.
    with contextlib.suppress(OSError):
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() == 0:
            nvml.nvmlDeviceGetCount_v2(ctypes.byref(num))
            nvml.nvmlShutdown()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return num.value
    return min(num.value, len([name for name in visible.split(",") if name and name != "NoDevFiles"]))
