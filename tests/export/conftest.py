"""Exported files of other backbones, necks and pooling methods, shared by the session."""

import functools

import pytest
from variants import variant_model

from maskrcnn.export.exporter import export_onnx


@pytest.fixture(scope="session")
def exported_variant(tmp_path_factory):
    """Maps a name of `EXPORTED` to (model, file, difference between the two)."""

    @functools.cache
    def exported(name: str):
        model, path = variant_model(name), tmp_path_factory.mktemp(name) / "model.onnx"
        return model, path, export_onnx(model, path)

    return exported
