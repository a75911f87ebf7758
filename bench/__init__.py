"""The benchmarks, installed as `cllm_spheres_bench`; each command of `cllm-spheres bench` is a module here."""
