"""LoRAs: in a transformer (`injection`), in files (`files`), in the spellings of other tools (`formats`)."""

from loraedit_ext.lora.files import (
    EXPORT_NAME,
    FILE_NAMES,
    LoraFile,
    check_finite,
    check_shapes,
    combine,
    read,
    read_of,
    save,
    write,
)
from loraedit_ext.lora.injection import (
    attach,
    check_model,
    initialise,
    inject,
    load,
    start_from,
    target_names,
    trainable,
)

__all__ = [
    "EXPORT_NAME",
    "FILE_NAMES",
    "LoraFile",
    "attach",
    "check_finite",
    "check_model",
    "check_shapes",
    "combine",
    "initialise",
    "inject",
    "load",
    "read",
    "read_of",
    "save",
    "start_from",
    "target_names",
    "trainable",
    "write",
]
