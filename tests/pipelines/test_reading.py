"""Faults of stores: a real S3 server and a real web server behind a proxy that breaks what they say."""

import errno
import io
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from webdataset.writer import TarWriter

from pipelines.data.index import encode_index, index_name, index_tar, read_index
from pipelines.data.shards import Manifest, encode_info, load_index, load_manifest, parse_manifest
from pipelines.errors import UserError
from pipelines.reading import ReadError, ReadPolicy, read_range
from pipelines.storage import Store, absolute
from tests.stores import Fault, FaultyProxy, moto_server, put, range_server, s3_environment

MIB = 1 << 20
NAME = "train-000000.tar"
DATA = random.Random(0).randbytes(12 * MIB + 12_345)
OFFSET, LENGTH = 1_000_003, 11 * MIB
# Where the first fault strikes: on S3 in the second piece of 8 MiB, over HTTP in the only answer.
PIECE, CUT = 8 * MIB, 9 * MIB + 3
PATIENT = ReadPolicy(deadline_s=60.0, stall_s=30.0, slow_least_s=30.0)
_buckets = itertools.count()


@dataclass
class Place:
    """A store behind a proxy, with the one file that tests read."""

    kind: str
    proxy: FaultyProxy
    store: Store
    folder: Path

    def add(self, name: str, data: bytes) -> None:
        if self.kind == "s3":
            put(self.proxy.upstream, f"{self.store.location.removeprefix('s3://')}/{name}", data)
        else:
            (self.folder / name).write_bytes(data)

    def once(self, fault: Fault) -> None:
        """The fault strikes one GET, in the middle of the range."""
        struck = 1 if self.kind == "s3" else 0
        self.proxy.rules = lambda method, _path, _range, count: fault if (method, count) == ("GET", struck) else None

    def cut(self) -> int:
        """How many bytes of the struck answer get through."""
        return CUT - PIECE if self.kind == "s3" else CUT

    def read(self, policy: ReadPolicy = PATIENT) -> bytes:
        return read_range(self.store, NAME, OFFSET, LENGTH, policy)

    def first_bytes(self) -> list[int]:
        return [request.first_byte - OFFSET for request in self.proxy.gets(NAME)]


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    with moto_server() as address:
        yield address


@pytest.fixture(params=["s3", "http"])
def place(request, moto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    folder = tmp_path / "served" / "shards"
    folder.mkdir(parents=True)
    with range_server(tmp_path / "served") as web, FaultyProxy(moto if request.param == "s3" else web) as proxy:
        if request.param == "s3":
            for name, value in s3_environment(proxy.address).items():
                monkeypatch.setenv(name, value)
            bucket = f"bucket-{next(_buckets)}"
            put(moto, bucket)
            store = Store(f"s3://{bucket}/shards")
        else:
            store = Store(f"{proxy.address}/shards")
        place = Place(request.param, proxy, store, folder)
        place.add(NAME, DATA)
        yield place
    deadline = time.monotonic() + 60
    while any(thread.name == "mae-read" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "a reading thread is left"
        time.sleep(0.05)


@pytest.mark.parametrize("fault", ["503", "429", "500", "cut", "reset"])
def test_a_broken_read_goes_on_from_the_byte_where_it_stopped(place: Place, fault: str):
    if fault.isdigit():
        place.once(Fault(status=int(fault)))
    else:
        place.once(Fault(cut_after_bytes=place.cut(), reset=fault == "reset"))
    assert place.read() == DATA[OFFSET : OFFSET + LENGTH]
    asked = place.first_bytes()
    if place.kind == "s3":
        assert asked == [0, PIECE, PIECE]  # only the piece that failed comes again
    elif fault == "reset":
        # What the kernel had not handed over when the reset came is lost, and nothing else.
        assert len(asked) == 2
        assert 0 < asked[1] <= CUT
    else:
        assert asked == [0, 0 if fault.isdigit() else CUT]


def test_a_read_that_stands_still_is_overtaken(place: Place):
    place.once(Fault(cut_after_bytes=place.cut(), stall_s=60.0))
    began = time.monotonic()
    data = place.read(ReadPolicy(stall_s=2.0))
    assert time.monotonic() - began >= 2.0
    assert data == DATA[OFFSET : OFFSET + LENGTH]
    assert place.proxy.in_flight >= 1  # the first one still stands
    assert place.first_bytes() == ([0, PIECE, PIECE] if place.kind == "s3" else [0, CUT])


def test_a_read_many_times_slower_than_usual_is_overtaken(place: Place):
    for _ in range(3):
        place.read()
    place.proxy.requests.clear()
    struck = 1 if place.kind == "s3" else 0
    # Bytes keep coming for 12 to 46 s; and they come while the second read, half a second long, is under way.
    place.proxy.rules = lambda method, _path, _range, count: (
        None if method != "GET" or count < struck else Fault(bytes_per_s=250e3 if count == struck else 20e6)
    )
    assert place.read(ReadPolicy(slow_least_s=1.0)) == DATA[OFFSET : OFFSET + LENGTH]
    assert place.proxy.in_flight >= 1  # the slow one is still on its way
    assert len(place.first_bytes()) == (3 if place.kind == "s3" else 2)


def test_a_store_that_is_away_and_comes_back(place: Place):
    assert place.read() == DATA[OFFSET : OFFSET + LENGTH]
    place.proxy.close_door()
    back = threading.Timer(2.0, place.proxy.open_door)
    back.start()
    began = time.monotonic()
    assert place.read() == DATA[OFFSET : OFFSET + LENGTH]
    back.join()
    assert time.monotonic() - began > 1.9


def test_a_fault_that_stays_is_one_clear_error(place: Place):
    struck = 1 if place.kind == "s3" else 0
    half = Fault(cut_after_bytes=place.cut())
    place.proxy.rules = lambda method, _path, _range, count: (
        None if method != "GET" or count < struck else half if count == struck else Fault(status=503)
    )
    with pytest.raises(ReadError) as caught:
        place.read(ReadPolicy(deadline_s=2.0))
    error = caught.value
    assert error.address == place.store.path(NAME)
    assert error.offset - OFFSET == (PIECE if place.kind == "s3" else CUT)
    assert error.attempts == len(place.proxy.gets(NAME)) - struck > 3
    assert "UNAVAILABLE" in error.reason or "503" in error.reason
    for part in (error.address, str(error.offset), f"{error.attempts} attempts"):
        assert part in str(error)
    assert "\n" not in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, ReadError)
    assert isinstance(again, UserError)
    assert (str(again), again.__dict__) == (str(error), error.__dict__)


@pytest.mark.timing
def test_a_fault_that_stays_ends_at_the_deadline(place: Place):
    place.proxy.rules = lambda *_: Fault(status=503)
    began = time.monotonic()
    with pytest.raises(ReadError):
        place.read(ReadPolicy(deadline_s=3.0))
    assert 3.0 <= time.monotonic() - began < 2 * 3.0


@pytest.mark.parametrize("fault", ["missing", "denied", "short"])
def test_what_stays_for_good_fails_at_once(place: Place, fault: str):
    name, length = NAME, LENGTH
    if fault == "missing":
        name = "train-000001.tar"
    elif fault == "denied":
        place.proxy.rules = lambda *_: Fault(status=403)
    else:
        length = len(DATA) - OFFSET + 1
    with pytest.raises(ReadError, match=f"No such file|denied|holds {len(DATA)} bytes") as caught:
        read_range(place.store, name, OFFSET, length, ReadPolicy(deadline_s=20.0))
    assert caught.value.attempts == 1
    assert len(place.proxy.requests) <= 2
    if fault == "missing":
        with pytest.raises(FileNotFoundError):
            place.store.read(name)


def test_whole_files_listings_and_uploads_pass_through_faults(place: Place):
    counts: Counter[str] = Counter()

    def rules(method: str, *_: object) -> Fault | None:
        counts[method] += 1
        return Fault(status=503) if counts[method] in (1, 3) else None

    place.proxy.rules = rules
    assert place.store.read(NAME) == DATA
    assert place.store.size(NAME) == len(DATA)
    assert place.store.exists("nothing") is False
    if place.kind == "s3":
        place.store.write("state.json", b"x" * (11 << 20))
        assert place.store.read("state.json") == b"x" * (11 << 20)
        assert place.store.sizes() == {NAME: len(DATA), "state.json": 11 << 20}
        assert place.store.names() == ["state.json", NAME]
    else:
        for act in (lambda: place.store.write("state.json", b"x"), place.store.names, place.store.delete):
            with pytest.raises(UserError, match="only read"):
                act()


def test_a_manifest_and_its_indexes_come_from_any_store(place: Place):
    names = [f"own-{n:04d}.tar" for n in range(3)]
    lengths, sizes, digests = [], [], []
    for n, name in enumerate(names):
        tar = io.BytesIO()
        writer = TarWriter(tar, mtime=0)
        for i in range(n + 1):
            writer.write({"__key__": f"{n}-{i}", "jpg": bytes([n, i]) * 50, "cls": i})
        writer.close()
        data = tar.getvalue()
        index = index_tar(io.BytesIO(data))
        place.add(name, data)
        place.add(index_name(name), encode_index(index, tar_bytes=len(data), tar_sha256=f"{n}" * 64))
        lengths, sizes, digests = [*lengths, len(index)], [*sizes, len(data)], [*digests, f"{n}" * 64]
    columns = (tuple(names), tuple(lengths), tuple(sizes), tuple(digests))
    place.add("_info.json", encode_info(Manifest("", "own", *columns, classes=("a", "b", "c"))).encode())

    manifest = load_manifest(place.store.location)
    assert manifest.shard_lengths == (1, 2, 3)
    manifest = load_manifest(f"{place.store.location}/own-{{0001..0002}}.tar")
    assert manifest.shard_names == ("own-0001.tar", "own-0002.tar")
    assert manifest.starts.tolist() == [0, 2, 5]
    index = load_index(manifest, 1)
    assert list(index.keys) == ["2-0", "2-1", "2-2"]
    store = Store(manifest.location)
    image = read_range(store, manifest.shard_names[1], int(index.offset_S[2]), int(index.size_S[2]))
    assert image == bytes([2, 2]) * 50
    with pytest.raises(UserError, match="is none of the 3 shards"):
        load_manifest(f"{place.store.location}/own-{{0001..0003}}.tar")
    place.add(names[2], b"cut")
    with pytest.raises(UserError, match=r"own-0002.tar should have \d+ bytes, it has 3"):
        load_manifest(place.store.location)


def test_a_web_server_without_ranges_is_refused(tmp_path: Path):
    (tmp_path / NAME).write_bytes(DATA[:MIB])
    with range_server(tmp_path, ranges=False) as address:
        assert Store(address).read(NAME) == DATA[:MIB]
        with pytest.raises(UserError, match="does not serve ranges"):
            read_range(Store(address), NAME, 5, 10)


def test_a_web_server_may_give_less_than_was_asked_for(tmp_path: Path):
    (tmp_path / NAME).write_bytes(DATA)
    with range_server(tmp_path, most=5 * MIB) as address:
        assert read_range(Store(address), NAME, OFFSET, LENGTH) == DATA[OFFSET : OFFSET + LENGTH]


def test_a_stuck_read_does_not_hold_up_the_end_of_the_process(moto: str, tmp_path: Path):
    script = (
        "import sys; from pipelines.reading import *; from pipelines.storage import Store\n"
        "try: read_range(Store(sys.argv[1]), sys.argv[2], 0, 4 << 20, ReadPolicy(deadline_s=2, stall_s=1))\n"
        "except ReadError: print('gave up', flush=True); sys.exit(3)"
    )
    with FaultyProxy(moto, lambda method, *_: Fault(bytes_per_s=50e3) if method == "GET" else None) as proxy:
        bucket = f"bucket-{next(_buckets)}"
        put(moto, bucket)
        put(moto, f"{bucket}/{NAME}", DATA)
        process = subprocess.Popen(
            [sys.executable, "-c", script, f"s3://{bucket}", NAME],
            env=os.environ | s3_environment(proxy.address),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "gave up\n"
            # All of the file would take 84 s.
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
            process.communicate()
        assert (process.returncode, said) == (3, "")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_file_is_read_through_errors_of_its_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    (tmp_path / NAME).write_bytes(DATA)
    pread, calls = os.pread, itertools.count()

    def failing(file: int, length: int, offset: int) -> bytes:
        if next(calls) % 2 == 0:
            raise OSError(number, os.strerror(number))
        return pread(file, min(length, 5 * MIB), offset)

    monkeypatch.setattr(os, "pread", failing)
    assert read_range(Store(str(tmp_path)), NAME, OFFSET, LENGTH) == DATA[OFFSET : OFFSET + LENGTH]


def test_a_file_whose_disk_stays_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / NAME).write_bytes(DATA)
    store, pread = Store(str(tmp_path)), os.pread
    with pytest.raises(ReadError, match="No such file"):
        read_range(store, "train-000001.tar", 0, 10)
    with pytest.raises(ReadError, match=f"ends at byte {len(DATA)}"):
        read_range(store, NAME, 10, len(DATA))

    def failing(file: int, length: int, offset: int) -> bytes:
        if offset > OFFSET:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(file, min(length, MIB), offset)

    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(ReadError) as caught:
        read_range(store, NAME, OFFSET, LENGTH, ReadPolicy(deadline_s=0.5))
    assert (caught.value.address, caught.value.offset) == (str(tmp_path / NAME), OFFSET + MIB)
    assert caught.value.attempts > 2
    assert caught.value.reason == os.strerror(errno.EIO)


def test_pipes_and_unknown_schemes_are_refused():
    with pytest.raises(UserError, match="would run a command"):
        load_manifest("pipe:cat /etc/passwd")
    with pytest.raises(UserError, match="unknown scheme 'ftp'"):
        load_manifest("ftp://host/shards")
    assert absolute("https://host/shards/") == "https://host/shards"
    secret = Store("https://me:pass@host/shards?sig=secret")
    assert (secret.path("a.tar"), secret.shown("a.tar")) == (
        "https://me:pass@host/shards/a.tar?sig=secret",
        "https://host/shards/a.tar",
    )


def test_a_manifest_of_100_000_shards_stays_usable(tmp_path: Path):
    num = 100_000
    names = tuple(f"train-{n:06d}.tar" for n in range(num))
    digests = tuple(f"{n:064x}" for n in range(num))
    manifest = Manifest(str(tmp_path), "train", names, (10_000,) * num, (1 << 30,) * num, digests, ())
    (tmp_path / "_info.json").write_text(encode_info(manifest))
    parsed = parse_manifest(Store(str(tmp_path)), json.loads(Store(str(tmp_path)).read("_info.json")))
    assert parsed == manifest
    assert parsed.digest == manifest.digest
    assert pickle.loads(pickle.dumps(parsed, protocol=5)) == manifest
    assert parsed.starts[-1] == parsed.num_samples == 1_000_000_000
    assert np.array_equal(
        np.searchsorted(parsed.starts, [0, 9_999, 10_000, 999_999_999], "right") - 1, [0, 0, 1, num - 1]
    )


def test_an_index_is_opened_again_after_a_fault_that_passes(shards: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    manifest = load_manifest(shards["train"])
    honest, opened = pa.memory_map, []

    def failing(path: str) -> pa.MemoryMappedFile:
        opened.append(path)
        if len(opened) < 3:
            raise OSError(errno.EIO, "the disk is away", path)
        return honest(path)

    monkeypatch.setattr("pyarrow.memory_map", failing)
    index, _ = read_index(Store(manifest.location), manifest.shard_names[0], ReadPolicy(deadline_s=30.0))
    assert len(opened) == 3
    assert len(index) == manifest.shard_lengths[0]
