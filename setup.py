"""Installs actloc from settings.ini, the one place where name, version and requirements are written."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

settings = ConfigParser(delimiters=["="])
settings.read(Path(__file__).parent / "settings.ini")
cfg = settings["DEFAULT"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    url=cfg["git_url"],
    keywords=cfg["keywords"].split(),
    python_requires=">=" + cfg["min_python"],
    # The experiment notebooks travel with the package: `actloc train` executes them wherever actloc is installed.
    packages=find_packages(include=["actloc", "actloc.*"]) + ["actloc.experiments"],
    package_dir={"actloc.experiments": "nbs/experiments"},
    package_data={"actloc.experiments": ["*.ipynb"]},
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split()},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    zip_safe=False,
)
