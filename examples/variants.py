"""Allele frequencies from a VCF Zarr store, as bio2zarr's `vcf2zarr` writes it.

$ vcf2zarr convert sample.vcf.gz sample.vcz
$ python examples/variants.py sample.vcz
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

import zarr_dask_stream as zds


def allele_counts(item: zds.Chunk) -> Any:
    """Count the calls of each allele of each variant; runs on the workers."""
    calls = item.data["call_genotype"]  # variants, samples, ploidy; -1 is no call, -2 fills up lower ploidies
    alleles = item.data["variant_allele"].shape[1]
    counts = np.stack([np.count_nonzero(calls == allele, axis=(1, 2)) for allele in range(alleles)], axis=1)
    return item.data["variant_position"], item.data["variant_allele"], counts


def frequencies(store: Any, **options: Any) -> Iterator[tuple[int, dict[str, float]]]:
    """Walk the variants of a store: the position of each, and how frequent its alleles are.

    A box holds all samples, ploidies and alleles of some variants: chunks along the samples go together. Where
    that would be too much at a time, ask for fewer variants with ``chunks={"variants": ...}``.
    """
    whole = {"samples": -1, "ploidy": -1, "alleles": -1}
    variables = ["call_genotype", "variant_position", "variant_allele"]
    for item in zds.stream_dataset(store, variables, chunks=whole, **options).map(allele_counts):
        for position, alleles, counts in zip(*item.data, strict=True):
            called = max(int(counts.sum()), 1)
            yield int(position), {str(a): int(n) / called for a, n in zip(alleles, counts, strict=True) if a}


def main(store: str) -> None:
    """Print a line for each variant."""
    for position, found in frequencies(store):
        print(position, " ".join(f"{allele}={frequency:.3f}" for allele, frequency in found.items()))


if __name__ == "__main__":
    main(*sys.argv[1:])
