"""Use an installed package from an empty folder: the least that has to work wherever it is installed.

    python -P tests/smoke.py [EXTRA ...]

Needs nothing but the package, and what the extras named bring. Run with -P and from elsewhere, so that no source
folder is on the path.
"""

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from distributed import Client, LocalCluster

import zarr_dask_stream as zds

#: What each extra brings, by module.
BRINGS = {
    "s3": ("s3fs", "aiohttp"),
    "http": ("aiohttp",),
    "obstore": ("obstore",),
    "xarray": ("xarray",),
    "jax": ("jax",),
    "torch": ("torch",),
    "demo": ("h5py", "pvlib"),
    "notebook": ("ipykernel", "ipywidgets", "matplotlib"),
    "metrics": ("prometheus_client",),
    "otel": ("opentelemetry",),
    "dashboard": ("bokeh",),
    "examples": ("msprime", "bio2zarr"),
}


def check_place() -> None:
    """Require the installed package, whole, and no source folder."""
    package = Path(zds.__file__).resolve().parent
    assert "site-packages" in package.parts, f"{package} is no installed package"
    assert (package / "py.typed").is_file()
    assert not Path("zarr_dask_stream").exists()
    for path in package.rglob("*.py"):
        name = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        if path.stem in {"__main__", "__init__"}:
            continue
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            # Some modules are imported only by who has asked for what they need.
            if not any((error.name or "").partition(".")[0] in brought for brought in BRINGS.values()):
                raise


def check_streams(folder: Path) -> None:
    """Stream an array in this thread, on a cluster inside this process, and on two worker processes."""
    data = np.arange(600, dtype="i4").reshape(20, 30)
    for zarr_format in (2, 3):
        place = folder / f"array{zarr_format}.zarr"
        array = zarr.create_array(place, shape=data.shape, chunks=(5, 10), dtype="i4", zarr_format=zarr_format)
        array[:] = data
        sums = {chunk.index: chunk.data for chunk in zds.stream_chunks(place, concurrency=1).map(total)}
        assert len(sums) == 12
        assert sum(sums.values()) == data.sum()
        assert zds.stream_chunks(place).reduce(zds.reducers.sum()).compute() == data.sum()
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0", scheduler_kwargs={"dashboard": False}
        ) as cluster,
        Client(cluster),
    ):
        assert sum(chunk.data for chunk in zds.stream_chunks(place).map(total)) == data.sum()
        report = (
            zds.stream_chunks(place, checkpoint=folder / "ledger").to_zarr(folder / "copy.zarr", chunks=(20, 5)).run()
        )
        assert report.emitted == 6, report
    np.testing.assert_array_equal(zarr.open_array(folder / "copy.zarr")[:], data)


def total(chunk: Any) -> int:
    """Add up a chunk."""
    return int(chunk.data.sum())


def check_command(folder: Path) -> None:
    """Run the command that was installed beside the interpreter."""
    zds_command = Path(sys.executable).with_name("zds")
    for words in (["--version"], ["info", "array3.zarr"], ["stats", "array2.zarr", "--json"]):
        subprocess.run([zds_command, *words], cwd=folder, check=True, capture_output=True, timeout=120)


def check_refusals(folder: Path) -> None:
    """Ask for what is not installed: the answer has to be the extra that brings it."""
    zds_command = Path(sys.executable).with_name("zds")
    for place, module, extra in (
        ("s3://bucket/a.zarr", "s3fs", "s3"),
        ("http://127.0.0.1:9/a.zarr", "aiohttp", "http"),
    ):
        if importlib.util.find_spec(module) is None:
            words = [str(zds_command), "stats", place]
            done = subprocess.run(words, cwd=folder, check=False, capture_output=True, text=True, timeout=120)
            assert done.returncode == 2, done
            assert f"pip install 'zarr-dask-stream[{extra}]'" in done.stderr, done.stderr


def use_xarray(folder: Path) -> None:
    """Label what is streamed."""
    xarray = importlib.import_module("xarray")
    xarray.Dataset({"t": (("x", "y"), np.ones((4, 6)))}).to_zarr(folder / "set.zarr")
    (item,) = zds.stream_dataset(folder / "set.zarr", concurrency=1)
    assert item.to_xarray()["t"].sum() == 24


def use_torch(folder: Path) -> None:
    """Load batches as tensors."""
    loader = zds.Loader(zds.stream_chunks(folder / "array3.zarr", concurrency=1), 5)
    assert sum(int(batch.sum()) for batch in loader.torch()) == 600 * 599 // 2


def use_jax(folder: Path) -> None:
    """Load batches as JAX arrays."""
    loader = zds.Loader(zds.stream_chunks(folder / "array3.zarr", concurrency=1), 5)
    assert sum(int(batch.sum()) for batch in loader.jax()) == 600 * 599 // 2


def use_obstore(folder: Path) -> None:
    """Read through obstore."""
    stores = importlib.import_module("obstore.store")
    store = zarr.storage.ObjectStore(stores.LocalStore(str(folder)), read_only=True)
    assert zds.stream_chunks(store, path="array3.zarr", concurrency=1).run().emitted == 12


def use_demo(folder: Path) -> None:
    """Run the demo."""
    zds_command = Path(sys.executable).with_name("zds")
    subprocess.run([zds_command, "demo"], cwd=folder, check=True, capture_output=True, timeout=120)


USES: dict[str, Callable[[Path], None]] = {
    "xarray": use_xarray,
    "torch": use_torch,
    "jax": use_jax,
    "obstore": use_obstore,
    "demo": use_demo,
}


def main(extras: list[str]) -> None:
    """Check everything, in the current folder."""
    folder = Path.cwd()
    check_place()
    check_streams(folder)
    check_command(folder)
    check_refusals(folder)
    provided = set(distribution("zarr-dask-stream").metadata.get_all("Provides-Extra") or ())
    wanted = sorted(set(BRINGS) & provided if "all" in extras else extras)
    for extra in wanted:
        if "all" in extras and extra in {"examples", "jax", "torch"}:
            continue  # `all` leaves these out: they are larger than everything else together
        for module in BRINGS.get(extra, ()):
            importlib.import_module(module)
        if extra in USES:
            USES[extra](folder)
    print("fine:", sys.version.split()[0], "zarr", zarr.__version__, "extras", ", ".join(wanted) or "none")


if __name__ == "__main__":
    main(sys.argv[1:])
