"""`python -m cllm_spheres` does what the command `cllm-spheres` does."""

from cllm_spheres_cli import main

if __name__ == "__main__":
    main()
