"""VCF Zarr as bio2zarr writes it, and allele frequencies from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bio2zarr.vcf
import numpy as np
import pytest
import xarray as xr

import zarr_dask_stream as zds
from formats.samples import example

VARIANTS, SAMPLES = 50, 11


def write_vcf(path: Path) -> list[tuple[int, list[str], np.ndarray[Any, Any]]]:
    """Write a VCF with variants of two and three alleles and missing calls; return what is in it."""
    rng = np.random.default_rng(20)
    lines = [
        "##fileformat=VCFv4.3",
        "##contig=<ID=20,length=1000000>",
        '##FORMAT=<ID=GT,Number=1,Type=String,Description="Genotype">',
        "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT" + "".join(f"\tsample{n}" for n in range(SAMPLES)),
    ]
    found = []
    for number in range(VARIANTS):
        alleles = ["A", "C", "GT"][: 3 if number % 4 == 0 else 2]
        calls = rng.integers(-1, len(alleles), (SAMPLES, 2))
        words = ["/".join("." if call < 0 else str(call) for call in pair) for pair in calls]
        position = 100 + 7 * number
        lines.append("\t".join(["20", str(position), ".", "A", ",".join(alleles[1:]), "30", "PASS", ".", "GT", *words]))
        found.append((position, alleles, calls))
    path.write_text("\n".join(lines) + "\n")
    return found


@pytest.fixture(params=[2, 3])
def vcz(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Any]:
    variants = write_vcf(tmp_path / "sample.vcf")
    bio2zarr.vcf.convert(
        [tmp_path / "sample.vcf"],
        tmp_path / "sample.vcz",
        variants_chunk_size=12,
        samples_chunk_size=4,
        zarr_format=request.param,
    )
    return tmp_path / "sample.vcz", variants


@pytest.mark.filterwarnings("ignore")  # of the writer and its libraries
def test_allele_frequencies(vcz: tuple[Path, Any]) -> None:
    store, variants = vcz
    found = list(example("variants").frequencies(store))
    assert [position for position, _ in found] == [position for position, _, _ in variants]
    for (_, frequencies), (_, alleles, calls) in zip(found, variants, strict=True):
        called = np.count_nonzero(calls >= 0)
        expected = {allele: np.count_nonzero(calls == n) / called for n, allele in enumerate(alleles)}
        assert frequencies == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore")
def test_genotypes_in_the_chunks_in_which_they_are_stored(vcz: tuple[Path, Any]) -> None:
    store, _ = vcz
    stream = zds.stream_dataset(store, ["call_genotype", "call_genotype_mask", "variant_id"], concurrency=1)
    assert len(stream) == 5 * 3
    whole = xr.open_zarr(store)[["call_genotype", "call_genotype_mask", "variant_id"]]
    for item in stream:
        place = dict(zip(stream.dims or (), item.region, strict=True))
        xr.testing.assert_identical(item.to_xarray(), whole.isel(place).load())


@pytest.mark.filterwarnings("ignore")
def test_the_example_prints_a_line_for_each_variant(vcz: tuple[Path, Any], capsys: pytest.CaptureFixture[str]) -> None:
    example("variants").main(str(vcz[0]))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == VARIANTS
    assert lines[0].startswith("100 A=")
