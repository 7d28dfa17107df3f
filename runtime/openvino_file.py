"""What an OpenVINO engine's XML says of itself, read without OpenVINO."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from maskrcnn.metadata import KEY, ModelMetadata, not_ours


def metadata_of_xml(path: Path) -> ModelMetadata:
    """The metadata of an engine, on any machine: whether it runs here is not asked.

    Raises:
        UserError: for a file that is no XML, or not ours.
    """
    try:
        entry = ElementTree.parse(path).getroot().find(f"rt_info/{KEY}")
    except ElementTree.ParseError as error:
        raise not_ours(path, f"no XML ({error})") from error
    if entry is None:
        raise not_ours(path, "an OpenVINO model without maskrcnn's metadata")
    return ModelMetadata.from_json(entry.get("value", ""), path)
