"""What six bits cost: scales that are searched, calibrated by text, and compared with others."""
