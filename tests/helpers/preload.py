"""What every rank of a test imports, loaded once by the fork server."""

import das_ds.training.run  # noqa: F401
