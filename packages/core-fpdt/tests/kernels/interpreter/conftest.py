from __future__ import annotations

import os

# Only test_triton_interpreted.py starts pytest so that the kernels are interpreted.
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
