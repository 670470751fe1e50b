"""Names of axes, coordinates and attributes as plain data, and the way from an item's arrays to xarray.

Labels travel with a stream's work, so that items can be labelled on the workers too. xarray is imported
when somebody asks for it, and it alone decodes: what it makes of the whole array, and what it makes of a
piece, have to be the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.source.array import ArraySpec
from zarr_dask_stream.source.grid import Region

__all__ = ["Label", "Labels", "array_labels", "hidden", "import_xarray", "label_of"]

_DIMENSIONS = "_ARRAY_DIMENSIONS"
Values = npt.NDArray[Any]


@dataclass(frozen=True)
class Label:
    """What is known of one array beside its values.

    Parameters
    ----------
    dims : tuple of str
        Names of its axes.
    attrs : mapping
        Its attributes.
    zarr_format : int
        2 or 3. In version 2 the fill value stands for missing values, in version 3 an attribute does.
    dtype : numpy.dtype, optional
        Of the stored values.
    fill_value : Any
        As the metadata have it.
    encoding : mapping
        Of an xarray object that the array was found in.
    pinned : tuple of int
        Axes of the array that such an object was indexed along by a number: it has none of them any more.
    """

    dims: tuple[str, ...]
    attrs: Mapping[str, Any]
    zarr_format: int = 3
    dtype: np.dtype[Any] | None = None
    fill_value: Any = None
    encoding: Mapping[str, Any] = field(default_factory=dict)
    pinned: tuple[int, ...] = ()


def hidden(attrs: Mapping[str, Any], zarr_format: int) -> dict[str, Any]:
    """Return the attributes that a reader gets to see: not those that stand for dimension names."""
    if zarr_format == 3:
        return dict(attrs)
    return {name: value for name, value in attrs.items() if name != _DIMENSIONS and not name.lower().startswith("_nc")}


@dataclass(frozen=True)
class Labels:
    """What is known of a stream's items beside their values.

    Parameters
    ----------
    dims : tuple of str
        Names of the axes of the items' grid.
    arrays : mapping of str to Label
        The arrays that are read with each item.
    coords : mapping of str to (Label, ndarray)
        Coordinates that go with the stream, whole.
    names : tuple of str
        Which of all these are coordinates.
    chosen : tuple of str
        Which of `arrays` were asked for; the others only label them.
    attrs : mapping
        Attributes of the group.
    single : str, optional
        Which of `arrays` is all there is to an item: it becomes a DataArray.
    title : str, optional
        Name of that DataArray.
    origin : mapping of str to int
        Where `coords` begin along each dimension, elements.
    shown : bool
        Whether the values are those that an xarray object shows; else they are stored ones.
    left_out : tuple of str
        Coordinates that are too large to go with the stream.

    Examples
    --------
    >>> labels = Labels(("x",), {"t": Label(("x",), {"units": "K"})}, single="t", title="t")
    >>> labels.to_xarray((slice(0, 2),), {"t": np.array([1.5, 2.5])}, {})
    <xarray.DataArray 't' (x: 2)>...
    array([1.5, 2.5])
    Dimensions without coordinates: x
    Attributes:
        units:    K
    """

    dims: tuple[str, ...]
    arrays: Mapping[str, Label]
    coords: Mapping[str, tuple[Label, Values]] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    chosen: tuple[str, ...] = ()
    attrs: Mapping[str, Any] = field(default_factory=dict)
    single: str | None = None
    title: str | None = None
    origin: Mapping[str, int] = field(default_factory=dict)
    shown: bool = False
    left_out: tuple[str, ...] = ()
    _whole: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_whole": []}

    def to_xarray(self, region: Region, data: Mapping[str, Values], decoding: Mapping[str, Any]) -> Any:
        """Label arrays.

        Parameters
        ----------
        region : tuple of slice
            Where they lie in the grid of the items, neighbours included.
        data : mapping of str to ndarray
            The values of `arrays`.
        decoding : mapping
            Options of ``xarray.decode_cf``; ``decode_cf=False`` for none of it.

        Returns
        -------
        xarray.Dataset or xarray.DataArray
        """
        xr = import_xarray("to_xarray()")
        if self.left_out:
            raise UsageError(
                f"coordinates {', '.join(map(repr, self.left_out))} are too large to go with each task: drop them "
                "(.drop_vars(...)), or give stream_dataset(...) the whole Dataset, which reads them in pieces"
            )
        place = dict(zip(self.dims, region, strict=True))
        if self.shown:
            if decoding:
                raise UsageError(
                    f"{', '.join(decoding)}: the values are decoded as the xarray object was opened; open it with "
                    "these options instead"
                )
            dataset = self._shown(xr, place, data)
        else:
            dataset = self._decoded(xr, place, data, dict(decoding))
        dataset = dataset.load()
        if self.single is None:
            return dataset
        return dataset[self.single].rename(self.title)

    def _piece(self, name: str, place: Mapping[str, slice]) -> Values:
        label, values = self.coords[name]
        starts = (self.origin.get(dim, 0) for dim in label.dims)
        parts = ((place[dim], start) for dim, start in zip(label.dims, starts, strict=True))
        # A copy: whoever gets the item may write to it, and the next item needs the values too.
        return values[tuple(slice(part.start - start, part.stop - start) for part, start in parts)].copy()

    # -- as an xarray object shows them ---------------------------------------------------------------

    def _shown(self, xr: Any, place: Mapping[str, slice], data: Mapping[str, Values]) -> Any:
        variables = {}
        for name, label in self.arrays.items():
            values = np.squeeze(data[name], label.pinned)
            variables[name] = xr.Variable(label.dims, values, label.attrs, dict(label.encoding))
        for name, (label, _) in self.coords.items():
            values = self._piece(name, place)
            variables[name] = xr.Variable(label.dims, values, label.attrs, dict(label.encoding))
        coords = {name: variables.pop(name) for name in self.names}
        return xr.Dataset(variables, coords, dict(self.attrs))

    # -- as they are stored ---------------------------------------------------------------------------

    def _decoded(
        self, xr: Any, place: Mapping[str, slice], data: Mapping[str, Values], decoding: dict[str, Any]
    ) -> Any:
        variables = {name: _raw(xr, label, data[name]) for name, label in self.arrays.items()}
        for name, (label, _) in self.coords.items():
            variables[name] = _raw(xr, label, self._piece(name, place))
        if decoding.pop("decode_cf", True):
            dataset = _decode(xr, variables, self.attrs, decoding)
        else:
            decoding = dict.fromkeys(("mask_and_scale", "decode_times", "concat_characters", "decode_coords"), False)
            dataset = _decode(xr, variables, self.attrs, decoding)
        names = [name for name in self.names if name in dataset.variables]
        if decoding.get("decode_coords", True):
            dataset = dataset.set_coords(names)
        else:
            extra = [name for name in names if name not in self.chosen]
            dataset = dataset.drop_vars([name for name in extra if dataset[name].dims != (name,)])
        whole = self._indexed(xr, decoding)
        if whole is None:
            return dataset
        # xarray decodes a dimension's coordinate as a whole, and what becomes of a piece may depend on the rest.
        parts = {dim: place[dim] for dim in whole.dims}
        return dataset.assign_coords(whole.isel(parts).coords)

    def _indexed(self, xr: Any, decoding: dict[str, Any]) -> Any:
        """Return the decoded coordinates of dimensions, whole; worked out once for each way to decode."""
        for options, dataset in self._whole:
            if options == decoding:
                return dataset
        raw = {name: _raw(xr, label, values) for name, (label, values) in self.coords.items() if label.dims == (name,)}
        dataset = _decode(xr, raw, {}, decoding).load() if raw else None
        self._whole[:] = [*self._whole[-3:], (decoding, dataset)]
        return dataset


def _raw(xr: Any, label: Label, values: Values) -> Any:
    """Return a variable as xarray's own reader makes it, before it decodes."""
    attrs = dict(label.attrs)
    if label.zarr_format == 2:
        if label.fill_value is not None:
            attrs["_FillValue"] = label.fill_value
    elif "_FillValue" in attrs:
        from xarray.backends.zarr import FillValueCoder  # noqa: PLC0415  # an optional dependency

        attrs["_FillValue"] = FillValueCoder.decode(attrs["_FillValue"], label.dtype or np.dtype(object))
    # Without this, strings of variable length would become objects.
    encoding = {"dtype": values.dtype} if values.dtype.kind == "T" else {}
    return xr.Variable(label.dims, values, attrs, encoding)


def _decode(xr: Any, variables: dict[str, Any], attrs: Mapping[str, Any], decoding: Mapping[str, Any]) -> Any:
    coords = {name: variable for name, variable in variables.items() if variable.dims == (name,)}
    others = {name: variable for name, variable in variables.items() if name not in coords}
    # Without indexes: they would be made of the values before they are decoded.
    dataset = xr.Dataset(others, xr.Coordinates(coords, indexes={}), dict(attrs))
    return xr.decode_cf(dataset, **decoding)


def import_xarray(what: str) -> Any:
    """Return xarray.

    Raises
    ------
    UsageError
        If it is not installed.
    """
    try:
        import xarray  # noqa: PLC0415  # an optional dependency
    except ImportError as error:
        raise UsageError(
            f"{what} needs xarray on this host: pip install 'zarr-dask-stream[xarray]' ({error})"
        ) from error
    return xarray


def label_of(spec: ArraySpec, dims: tuple[str, ...]) -> Label:
    """Return the label of a stored array."""
    return Label(dims, hidden(spec.attributes, spec.zarr_format), spec.zarr_format, spec.stored_dtype, spec.fill_value)


def array_labels(spec: ArraySpec) -> Labels | None:
    """Return what labels the chunks of one array; None where its axes have no names, or two the same."""
    names = spec.dimension_names if spec.shape else ()
    if names is None or None in names or len(set(names)) < len(names):
        return None
    dims: tuple[str, ...] = names  # type: ignore[assignment]  # no None left
    title = spec.path.rpartition("/")[2] or None
    name = title or "_".join((*dims, "values"))  # longer than any dimension's, hence none of them
    return Labels(dims, {name: label_of(spec, dims)}, single=name, title=title)
