"""Everything beyond the core, one file per capability."""

import datasets  # noqa: F401 (it says what is missing, also to `python -m extras.NAME`)
