"""How long a checkpoint holds up training, and what it costs the steps beside it: ``python -m benchmarks.checkpoint``.

Steps on random pixels, and every so often a checkpoint as a run writes it (``pipelines.training.writer``), to a folder
and to an S3 server (moto, in a process of its own on this machine). The plain way, a copy of all tensors and
``safetensors.torch.save`` of it, has its turns for comparison.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import psutil
import pyarrow.fs as pafs
import safetensors.torch
import torch
import tyro
from pydantic import BaseModel, ConfigDict, Field

from cluster.processes import free_ports, wait_until
from mae_core.model import MaskedAutoencoder
from mae_core.optim import make_optimizer, set_lr
from pipelines.cli import parse
from pipelines.errors import UserError, run_command
from pipelines.storage import Store
from pipelines.training import checkpoint
from pipelines.training.writer import Writer


class Checkpoint(BaseModel):
    """Measures what a checkpoint costs training."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    arch: str = "vit_base_patch16_224"
    """A plain ViT of timm."""
    image_size: int = Field(default=224, gt=0)
    """Pixels a side."""
    batch: int = Field(default=4, gt=0)
    """Images a step."""
    device: str = "cpu"
    """cpu or cuda."""
    threads: int = Field(default=0, ge=0)
    """CPU threads of the training; 0: PyTorch's own choice."""
    turns: int = Field(default=3, ge=1)
    """Checkpoints of each kind, after a first one that does not count: it makes the memory."""
    steps: int = Field(default=4, ge=2)
    """Steps without a checkpoint before each."""
    folder: str = ""
    """Where the local ones go; empty: the system's temporary folder."""
    s3: bool = True
    """Also to an S3 server."""
    output: Annotated[str, tyro.conf.arg(name="json")] = ""
    """File for the numbers; empty: none."""


@contextlib.contextmanager
def moto() -> Iterator[Store]:
    """A bucket on an S3 server of this machine; it keeps all in memory."""
    (port,) = free_ports(1)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: any(each.laddr.port == port for each in psutil.Process(process.pid).net_connections()), 60)
        address = f"http://127.0.0.1:{port}"
        os.environ |= {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        pafs.S3FileSystem(endpoint_override=address, allow_bucket_creation=True).create_dir("bucket")
        yield Store("s3://bucket/checkpoints")
    finally:
        process.kill()
        process.wait()


class Training:
    """A model that does steps, and says how long each took, and how long its optimiser waited."""

    def __init__(self, args: Checkpoint):
        self._device = torch.device(args.device)
        with self._device:
            self.model = MaskedAutoencoder(args.arch, image_size=args.image_size)
        self.optimizer = make_optimizer(self.model)
        generator = torch.Generator().manual_seed(0)
        shape = (args.batch, 3, args.image_size, args.image_size)
        self._images_BCHW = torch.randn(*shape, generator=generator).to(self._device)
        self._noise_BN = torch.rand(args.batch, self.model.num_patches, generator=generator).to(self._device)
        self._asked = self.waited = 0.0
        # The first hook of all, and (registered after the writer's) the last.
        self.optimizer.register_step_pre_hook(lambda *_: self._ask())
        set_lr(self.optimizer, 1e-5)

    def _ask(self) -> None:
        self._asked = time.perf_counter()

    def _answered(self) -> None:
        self.waited += time.perf_counter() - self._asked

    def watch(self) -> None:
        """From now on what comes between the first hook and this one is time that the optimiser waits."""
        self.optimizer.register_step_pre_hook(lambda *_: self._answered())

    def step(self) -> float:
        """One step; its seconds."""
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        self.model(self._images_BCHW, self._noise_BN)["loss"].backward()
        self.optimizer.step()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def asynchronous(training: Training, writer: Writer, number: int, usual_s: float) -> dict[str, float]:
    """Steps while a checkpoint is written, until it is."""
    training.waited = 0.0
    start = time.perf_counter()
    writer.save(number, training.model, training.optimizer, {})
    called = time.perf_counter() - start
    steps = []
    while writer.busy:
        steps.append(training.step())
    writer.wait()
    # Where the last step ended later than the writer, only the writer's end counts: see `told`.
    return {
        "hold_up_s": called + training.waited,
        "steps": len(steps),
        "step_s": statistics.mean(steps),
        "slower": statistics.mean(steps) / usual_s - 1,
        "more_s": sum(steps) - len(steps) * usual_s,
    }


def plain(training: Training, checkpoints: Store, number: int) -> dict[str, float]:
    """A copy of everything, and then the library's file of it, written at once: all of it holds up training."""
    start = time.perf_counter()
    tensors = checkpoint.tensors_of(training.model, training.optimizer)
    copies = {f: {name: t.detach().to("cpu", copy=True) for name, t in ts.items()} for f, ts in tensors.items()}
    copied = time.perf_counter() - start
    for file, values in copies.items():
        checkpoints.child(f"plain-{number}").write(file, safetensors.torch.save(values))
    seconds = time.perf_counter() - start
    checkpoints.child(f"plain-{number}").delete()
    return {"copy_s": copied, "write_s": seconds - copied, "hold_up_s": seconds}


def measure(args: Checkpoint, training: Training, checkpoints: Store) -> dict[str, Any]:
    """All turns in one place."""
    ended: list[float] = []
    writer = Writer(checkpoints, 2, lambda: ended.append(time.perf_counter()))
    writer.save(0, training.model, training.optimizer, {})
    training.step()
    writer.wait()
    training.watch()
    turns: list[dict[str, Any]] = []
    for number in range(1, args.turns + 1):
        usual = statistics.median(training.step() for _ in range(args.steps))
        start = time.perf_counter()
        turn = asynchronous(training, writer, number, usual)
        write_s = ended[-1] - start
        turn |= {"usual_step_s": usual, "write_s": write_s, "held_up": turn["hold_up_s"] / write_s}
        turns.append({**turn, "plain": plain(training, checkpoints, number)})
    writer.wait()
    return {"turns": turns, "location": checkpoints.location}


def told(name: str, found: dict[str, Any]) -> str:
    """What was measured in one place, as medians."""

    def median(key: str) -> float:
        return statistics.median(turn[key] for turn in found["turns"])

    plainly = statistics.median(turn["plain"]["hold_up_s"] for turn in found["turns"])
    return (
        f"  {name:6} written in {median('write_s'):.2f} s; training held up for {1000 * median('hold_up_s'):.1f} ms, "
        f"{100 * median('held_up'):.2f} % of that; a step meanwhile {100 * median('slower'):+.0f} %, in all "
        f"{median('more_s'):.2f} s; the plain way holds up for {plainly:.2f} s"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parse(Checkpoint, prog="python -m benchmarks.checkpoint", argv=argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        training = Training(args)
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error).splitlines()[0]) from None
    training.step()
    size = checkpoint.num_bytes(training.model)
    print(f"{args.arch}, {args.image_size} px, batch {args.batch}, {args.device}, {torch.get_num_threads()} threads, "
          f"checkpoints of {size / 1e9:.2f} GB", flush=True)  # fmt: skip
    result: dict[str, Any] = {"bytes": size, "torch": torch.__version__, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory(dir=args.folder or None) as folder:
        result["folder"] = measure(args, training, Store(folder).child("checkpoints"))
        print(told("folder", result["folder"]), flush=True)
    if args.s3:
        with moto() as store:
            result["s3"] = measure(args, training, store)
        print(told("s3", result["s3"]), flush=True)
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    run_command(main)
