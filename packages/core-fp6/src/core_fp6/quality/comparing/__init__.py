"""What storing weights in few bits costs: six bits against eight, four, and other libraries."""

from core_fp6.quality.comparing.evaluation import compare as compare
from core_fp6.quality.comparing.plotting import plot as plot
from core_fp6.quality.comparing.results import Comparison as Comparison, Score as Score
from core_fp6.quality.comparing.variants import (
    DEFAULT as DEFAULT,
    Variant as Variant,
    variant as variant,
)
