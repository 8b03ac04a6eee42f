# SPDX-License-Identifier: MIT
"""Networks whose encoder computes in int8, by the quantisation tool of ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.files import replacing

Inputs = dict[str, NDArray[Any]]
"""Values of a network's inputs, by name."""

_LAYERS = ["Conv", "Relu", "MaxPool"]  # between which a map stays in int8
_SCOPES = "pkg.torch.onnx.name_scopes"  # of a node: the modules that it comes from
_ENCODER = "'network.encoder'"


def quantise(network: Path, output: Path, images: Iterable[Inputs]) -> float:
    """Write a network whose encoder computes in int8; the rest stays in float32.

    Weights have a scale per output channel; maps have one from their least to their largest
    value in some images (static quantisation, QuantizeLinear and DequantizeLinear). The first
    layer stays in float32, too: it is small, and in int8 it spoils descriptors more than all
    others together.

    Parameters
    ----------
    network : Path
        As :func:`~patchnetvlad.recipes.export.export` writes it.
    output : Path
    images : iterable of dict
        One or more, of which the encoder's maps are computed.

    Returns
    -------
    float
        Median cosine of what both networks return for the first image: patch descriptors of all
        sizes, or the global descriptor if there are none.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quant_pre_process, quantize_static

    model = onnx.load(network)
    encoder = [
        node
        for node in model.graph.node
        if any(p.key == _SCOPES and _ENCODER in p.value for p in node.metadata_props)
    ]
    outputs = list(model.graph.output)
    names = {output.name for output in outputs}
    constant = [value for value in model.graph.initializer if value.name in names]
    for value in constant:  # as are key points of images that are resized
        model.graph.initializer.remove(value)
    maps = onnx.helper.make_tensor_value_info(encoder[-1].output[0], onnx.TensorProto.FLOAT, None)
    _set_outputs(model, [maps])  # so that nothing else is computed
    given = iter(images)
    first = next(given)
    left = chain([first], given)
    with tempfile.TemporaryDirectory() as folder:
        prepared, quantised = Path(folder, "prepared.onnx"), Path(folder, "quantised.onnx")
        # It prepares nothing, but without its note in the file the tool would complain.
        quant_pre_process(
            model, prepared, skip_optimization=True, skip_onnx_shape=True, skip_symbolic_shape=True
        )
        quantize_static(
            prepared,
            quantised,
            SimpleNamespace(get_next=lambda: next(left, None)),
            op_types_to_quantize=_LAYERS,
            nodes_to_quantize=[node.name for node in encoder[1:]],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        model = onnx.load(quantised)
    _set_outputs(model, outputs)
    model.graph.initializer.extend(constant)
    onnx.checker.check_model(model)
    content = model.SerializeToString()
    cosine = _agreement(network.read_bytes(), content, first)
    with replacing(output) as part:
        part.write(content)
    return cosine


def _set_outputs(model: Any, outputs: list[Any]) -> None:
    del model.graph.output[:]
    model.graph.output.extend(outputs)


def _agreement(network: bytes, other: bytes, image: Inputs) -> float:
    import onnxruntime

    found = []
    for model in (network, other):
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        names = [name for name in names if name.startswith("patches")] or ["descriptor"]
        vectors = session.run(names, image)
        found.append(np.concatenate([of.reshape(-1, of.shape[-1]) for of in vectors]))
    return float(np.median((found[0] * found[1]).sum(axis=1)))
