"""Where tritonserver is: NVIDIA's container, the PATH, or the `nvidia-pytriton` wheel, in this order.

The wheel carries the real server and the Python backend, but not in the layout that the server expects, and its stub
needs help to find an interpreter: a backend folder is put together from links, LD_LIBRARY_PATH names the wheel's
libraries and the running interpreter's libpython (the system's would bring another standard library), and PATH makes
the stub run the very environment that runs us.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from puzzle_trtllm.errors import ServeError

CONTAINER_SERVER = Path("/opt/tritonserver/bin/tritonserver")


@dataclass(frozen=True, kw_only=True)
class TritonInstall:
    """A tritonserver that can be started."""

    server: Path
    source: str
    """container | PATH | wheel"""
    wheel: Path | None = None
    """The wheel's `pytriton/tritonserver` folder."""
    environment: dict[str, str] = field(default_factory=dict)
    """What the server's environment needs beyond ours."""

    def arguments(self, scratch: Path) -> list[str]:
        """Command-line arguments that the installation needs; may put files into `scratch`."""
        if self.wheel is None:
            return []
        return ["--backend-directory", str(_link_backends(self.wheel, scratch / "backends"))]


def find_triton() -> TritonInstall:
    """Find a server. Raises ServeError that says how to get one."""
    if CONTAINER_SERVER.is_file():
        return TritonInstall(server=CONTAINER_SERVER, source="container")
    on_path = shutil.which("tritonserver")
    if on_path is not None:
        return TritonInstall(server=Path(on_path).resolve(), source="PATH")
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise ServeError(
            "no tritonserver found",
            expected=f"{CONTAINER_SERVER} (NVIDIA's container), tritonserver on PATH, "
            "or the wheel: pip install 'puzzle-trtllm[triton-wheel]'",
        )
    return _from_wheel(Path(spec.submodule_search_locations[0]))


def _from_wheel(package: Path) -> TritonInstall:
    wheel = package / "tritonserver"
    server = wheel / "bin" / "tritonserver"
    if not server.is_file():
        raise ServeError("missing in the nvidia-pytriton wheel", file=server)
    for paths in package.parent.glob("*.pth"):
        if not paths.read_bytes().isascii():  # the stub would die at its start, and the server wait for it for ever
            expected = "the checkout that it names in a folder with such a name"
            raise ServeError("Triton's Python stub reads only ASCII here", file=paths, expected=expected)
    libraries = [str(package.parent / "nvidia_pytriton.libs"), str(_libpython_folder())]
    environment = {
        "LD_LIBRARY_PATH": os.pathsep.join([*libraries, *_set("LD_LIBRARY_PATH")]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), *_set("PATH")]),
    }
    return TritonInstall(server=server, source="wheel", wheel=wheel, environment=environment)


def _set(variable: str) -> list[str]:
    value = os.environ.get(variable)
    return [value] if value else []


def _libpython_folder() -> Path:
    name = str(sysconfig.get_config_var("INSTSONAME") or "")
    if ".so" not in name:  # a static build says libpython3.x.a
        name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    places = [sysconfig.get_config_var(key) for key in ("LIBDIR", "LIBPL")]
    multiarch = sysconfig.get_config_var("MULTIARCH") or "x86_64-linux-gnu"
    for folder in [*places, f"{sys.base_prefix}/lib", f"/usr/lib/{multiarch}", "/usr/lib64"]:
        if folder and (Path(folder) / name).is_file():
            return Path(folder)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    raise ServeError(
        f"{name} not found: Triton's Python stub needs the interpreter as a shared library",
        expected=f"the package libpython{version}, or a Python built with --enable-shared",
    )


def _link_backends(wheel: Path, folder: Path) -> Path:
    """`folder`/python with the backend's files and the stub of the running Python version, as links."""
    stubs = wheel / "python_backend_stubs"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = stubs / version / "triton_python_backend_stub"
    if not stub.is_file():
        known = ", ".join(sorted(path.name for path in stubs.iterdir()))
        raise ServeError("the nvidia-pytriton wheel has no stub for this Python", found=version, expected=known)
    backend = folder / "python"
    backend.mkdir(parents=True)
    for file in [*(wheel / "backends" / "python").iterdir(), stub]:
        if file.is_file():
            (backend / file.name).symlink_to(file)
    return folder
