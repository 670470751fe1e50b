"""The notebooks run from top to bottom in a real kernel, and come to what they say."""

import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
_OF_A_MACHINE = re.compile(r"/tmp/|/home/|/root/|/Users/|(tcp|inproc|tls)://|\b\d+\.\d+\.\d+\.\d+:\d+")


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]  # typed only in part


def outputs_of(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def text_of(output: Any) -> str:
    """What a person reads of an output, pictures aside."""
    if output.output_type == "stream":
        return str(output.text)
    return json.dumps({kind: data for kind, data in output.get("data", {}).items() if not kind.startswith("image/")})


def pictures_of(notebook: Any) -> list[str]:
    """The kinds of all pictures, in order."""
    return [kind for output in outputs_of(notebook) for kind in output.get("data", {}) if kind.startswith("image/")]


def execute(name: str, folder: Path, *expressions: str) -> tuple[Any, dict[str, Any]]:
    """Run a notebook with one more cell at its end, and return it with the values of `expressions`."""
    notebook = read(NOTEBOOKS / name)
    asked = ", ".join(f"{expression!r}: {expression}" for expression in expressions)
    source = f"import json\nprint(json.dumps({{{asked}}}, default=float))"
    notebook.cells.append(nbformat.v4.new_code_cell(source))  # type: ignore[no-untyped-call]  # typed only in part
    client = NotebookClient(notebook, timeout=250, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute()
    values = json.loads(notebook.cells.pop().outputs[0].text)
    return notebook, values


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_committed_outputs_are_whole_and_name_no_machine(path: Path) -> None:
    outputs = outputs_of(read(path))
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [text for output in outputs if _OF_A_MACHINE.search(text := text_of(output))]
    assert path.stat().st_size < 420_000


@pytest.mark.slow
@pytest.mark.sample
@pytest.mark.timeout(300)
def test_chunk_streaming(tmp_path: Path) -> None:
    notebook, values = execute(
        "01_chunk_streaming.ipynb",
        tmp_path,
        "summit",
        "tops.max()",
        "is_ordered",
        "len(speeds)",
        "{name: len(indices) for name, indices in kept.items()}",
        "list(reached)",
        "[[estimate, peak] for estimate, peak in peaks.values()]",
        "canvas.any(axis=2).mean()",
    )
    summit, highest, ordered, speeds, kept, marks, peaks, painted = values.values()
    assert summit == highest == 2263
    assert ordered
    assert speeds == 6
    assert kept == {"everything": 256, "where": 96, "filter": 142, "both": 72}
    assert marks == [0.25, 0.5, 0.75, 1.0]
    assert all(0 < peak <= estimate for estimate, peak in peaks)
    assert painted == 1.0
    outputs = outputs_of(notebook)
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    assert pictures_of(notebook) == ["image/png"] * 3 + ["image/jpeg"]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "facts"),
    [
        pytest.param(
            "02_parallel_reads.ipynb",
            {
                "max(speeds) > 2 * alone.chunks_per_s": True,
                "chosen > 2 * alone.chunks_per_s": True,
                "[report.emitted for report in (waited, asked_again, held)]": [512, 512, 512],
                "sum(count for *_, count in tasks.bars)": 512,
            },
            id="02",
        ),
        pytest.param(
            "03_where_the_time_goes.ipynb",
            {
                "list(slow) == list(mended)": True,
                "[report.emitted for report in slow.values()]": [256] * 5,
            },
            id="03",
        ),
        pytest.param(
            "04_backpressure_and_supervision.ipynb",
            {
                "len(got)": 254,
                "len(maxima)": 256,
                "[len(batch) for batch in batches]": [60, 60, 60, 60, 16],
                "len(set(before) | set(after))": 256,
            },
            id="04",
        ),
        pytest.param(
            "05_codecs_v2_v3_shards.ipynb",
            {"len(sizes)": 9, "len(answers)": 1, "[objects for objects, *_ in figures.values()]": [864, 36, 36]},
            id="05",
        ),
        pytest.param(
            "06_climate_statistics.ipynb",
            {
                "round(world, 2)": 3.13,
                "[stream.report.emitted, boxes.report.emitted]": [12, 108],
                "[len(PLACES), report.outcome]": [6, "done"],
            },
            id="06",
        ),
        pytest.param(
            "07_similarity_search.ipynb",
            {
                "rows * columns": 207825,
                "[len(places) for places in matches.values()]": [10] * 4,
                "search.report.emitted": 27,
            },
            id="07",
        ),
        pytest.param(
            "08_market_ticks_stress.ipynb",
            {
                "mistakes": 0,
                "[len(tables), BARS]": [20, 78],
                "sum(int(table[:, 6].sum()) for table in tables.values()) == int(sizes.sum())": True,
            },
            id="08",
        ),
        pytest.param(
            "09_image_tiles_and_variants.ipynb",
            {
                "places == at_once": True,
                "len(wrong) > 5": True,
                "common.shape[1] == genomes.num_sites": True,
            },
            marks=pytest.mark.sample,
            id="09",
        ),
        pytest.param(
            "10_train_from_zarr.ipynb",
            {
                "right / tested > sea / tested + 0.05": True,
                "len(losses) == EPOCHS * len(loader)": True,
            },
            id="10",
        ),
    ],
)
def test_the_others(name: str, facts: dict[str, Any], tmp_path: Path) -> None:
    committed = len(pictures_of(read(NOTEBOOKS / name)))
    notebook, values = execute(name, tmp_path, *facts)
    assert values == facts
    outputs = outputs_of(notebook)
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    assert len(pictures_of(notebook)) == committed > 0
