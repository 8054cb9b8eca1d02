"""Loads the compiled extension, or says why it is not there. BVAE_DISABLE_EXTENSION=1 leaves it out on purpose."""

import importlib
import os


def load() -> str | None:
    """Registers torch.ops.bvae. Returns None, or one line on why the extension is not in use."""
    if os.environ.get("BVAE_DISABLE_EXTENSION") == "1":
        return "BVAE_DISABLE_EXTENSION=1"
    import torch  # its libraries must be loaded before the extension that links to them

    try:
        importlib.import_module("bvae._C")
    except ModuleNotFoundError as error:
        if error.name != "bvae._C":
            raise
        return "bvae._C was not built (no C++ compiler at installation)"
    except ImportError as error:
        return f"bvae._C could not be loaded: {error}"
    op = getattr(torch.ops.bvae, "balanced_loss", None)
    if op is None or "monotone" not in str(op.default._schema) or not hasattr(torch.ops.bvae, "relu_grad"):
        return "bvae._C was built from older sources: build it again"
    return None
