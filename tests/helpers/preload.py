"""What every rank of a test imports, loaded once by the fork server."""

import das_ds.training.sequence  # noqa: F401
