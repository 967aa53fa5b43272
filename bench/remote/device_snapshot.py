"""The environment of a device without Python: its system files, copied here and read here."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .device_link import DeviceLink

MARK = "@@vitrim "
CPU0 = "/sys/devices/system/cpu/cpu0"
FILES = (
    *("/proc/cpuinfo", "/proc/meminfo", "/proc/loadavg", "/etc/os-release"),
    *("/proc/device-tree/model", "/sys/class/dmi/id/sys_vendor", "/sys/hypervisor/type"),
    *(f"{CPU0}/cpufreq/cpuinfo_max_freq", f"{CPU0}/cpufreq/scaling_cur_freq"),
    *(f"{CPU0}/cpufreq/scaling_governor", f"{CPU0}/thermal_throttle/package_throttle_count"),
    "/sys/class/thermal/thermal_zone*/temp",
)
SCRIPT = (
    f'show() {{ echo; echo "{MARK}$1"; cat "$2" 2>/dev/null; }}; '
    f'echo; echo "{MARK}/uname"; uname -r -m; show /proc/stat /proc/stat; '
    f"for file in {' '.join(FILES)}; do [ -r $file ] && show $file $file; done; "
    "command -v vcgencmd >/dev/null 2>&1 && "
    f'{{ echo; echo "{MARK}/vcgencmd"; vcgencmd get_throttled; }}; '
    "sleep 0.2 2>/dev/null || sleep 1; show /proc/stat.after /proc/stat; exit 0"
)


def device_environment(link: DeviceLink) -> dict[str, Any]:
    """Return {"machine", "state"} of a device, as environment.py reports them on the device.

    Raises InputError and LinkLost.
    """
    output = link.run(SCRIPT).decode(errors="replace")
    with tempfile.TemporaryDirectory(prefix="vitrim-snapshot-") as folder:
        for part in output.split("\n" + MARK)[1:]:
            name, _, content = part.partition("\n")
            # The names should be those of SCRIPT, but a device's output is untrusted.
            steps = [step for step in name.strip().split("/") if step not in ("", ".", "..")]
            path = Path(folder, *steps)
            if path == Path(folder) or path.is_dir():
                continue
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content.replace("\0", ""))
            except OSError:
                continue
        # A subprocess, since the root folder is a global of environment.py.
        done = subprocess.run(
            [sys.executable, str(Path(__file__).parents[1] / "local" / "environment.py"), folder],
            stdout=subprocess.PIPE,
            check=True,
            timeout=60,
        )
    found: dict[str, Any] = json.loads(done.stdout.decode())
    return found
