"""What a step takes: bytes of live tensors."""

from core_fpdt.measuring.meter import Meter as Meter, hosted as hosted, per_token as per_token
