"""Products on GPUs, in Triton.

The kernels decode codes in registers, right before matrix units take them (FP6-LLM, arXiv
2401.14112, sections 4 and 5), for any number of rows and columns, float16, bfloat16 and float32.
"""

from core_fp6.kernels.gpu.dispatch import (
    dequantize as dequantize,
    grouped_linear as grouped_linear,
    linear as linear,
)
from core_fp6.kernels.gpu.settings import fp8_activations as fp8_activations
from core_fp6.kernels.gpu.tuning import prepare as prepare
