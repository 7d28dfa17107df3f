"""Exported files of other backbones, necks and pooling methods, shared by the session."""

import functools
import pickle

import pytest
from variants import variant_model

from maskrcnn.export.exporter import export_onnx


@pytest.fixture(scope="session")
def exported_variant(shared):
    """Maps a name of `EXPORTED` to (model, file, difference between the two)."""

    @functools.cache
    def exported(name: str):
        def make(folder):
            difference = export_onnx(variant_model(name), folder / "model.onnx")
            (folder / "difference.pickle").write_bytes(pickle.dumps(difference))

        folder = shared(name, make)
        difference = pickle.loads((folder / "difference.pickle").read_bytes())
        return variant_model(name), folder / "model.onnx", difference

    return exported
