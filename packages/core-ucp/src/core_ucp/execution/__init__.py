"""From a view to a target: copies are planned, proven, and carried out in bounded memory."""
