"""Lets a CUDA build of torchvision be imported beside a CPU build of torch.

Package indexes carry torchvision as a CUDA build only. Beside a CPU torch its compiled operators can't be loaded, and
`import torchvision` dies with "operator torchvision::nms does not exist": it registers the shape rules of two
operators that nobody defined. open_clip and transformers need its image transforms, none of those operators; so
defining the two schemas is enough.

It has to hold in every Python process: Ray's workers, and the interpreter vLLM starts to inspect a model class. So
`finecap_torchvision.pth`, which the wheel puts into site-packages, calls `install` at each interpreter start.
That must cost nothing: no import here but `sys`. The finder waits for `torchvision._meta_registrations`, which
torchvision imports after it has tried to load its operators; only then can one see whether they are missing.
"""

import sys

AWAITED = "torchvision._meta_registrations"
OPERATORS = ("torchvision::nms", "torchvision::qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def schemas_missing(cuda: str | None, nms_defined: bool) -> bool:
    """Whether the schemas must be defined: torch was built without CUDA, and torchvision's operators didn't load.

    `cuda` is torch.version.cuda. With a CUDA torch a failed load is a broken install, whose error must stay visible.
    """
    return cuda is None and not nms_defined


class SchemaFinder:
    """A meta-path finder that finds nothing: it only learns that an import is about to happen, and acts on one name."""

    def find_spec(self, name, path=None, target=None):
        if name == AWAITED:
            import torch

            if schemas_missing(torch.version.cuda, hasattr(torch.ops.torchvision, "nms")):
                for operator in OPERATORS:
                    torch.library.define(operator, SCHEMA)
        return None


def install() -> None:
    """Put the finder first on the meta path, once."""
    if not any(isinstance(finder, SchemaFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, SchemaFinder())
