"""The console script `cllm-spheres`: kept free of heavy imports, the commands load what they need."""


def main() -> None:
    """Run the command line; errors made on purpose become one message and an exit code."""
    from cllm_spheres_cli.app import run

    run()
