"""The kernels in bfloat16: operands of products rounded to it, everything else float32."""
