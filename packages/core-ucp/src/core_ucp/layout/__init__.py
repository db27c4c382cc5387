"""The language that says how parameters are cut, fused, tied and padded over ranks."""
