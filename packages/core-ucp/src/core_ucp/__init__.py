"""Any checkpoint resumes on any parallel layout, proven lossless."""

__version__ = "0.1.0"
