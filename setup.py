"""The packages: those in diffusion_pl/, and experiments/, which is installed among them."""

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

EXPERIMENTS = "diffusion_pl.experiments"


class WithExperiments(build_py):
    """Takes YAML and prompts of experiments/ alone: the script that lies there is no module."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """The modules of a package."""
        return [] if package == EXPERIMENTS else super().find_package_modules(package, package_dir)


setup(
    packages=[*find_packages(include=["diffusion_pl*"]), EXPERIMENTS],
    package_dir={EXPERIMENTS: "experiments"},
    cmdclass={"build_py": WithExperiments},
)
