"""A device's files about itself, brought here over a link and read by environment.py: for a device
that has no Python.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .device_link import DeviceLink

MARK = "@@vitrim "
FILES = (
    "/proc/cpuinfo /proc/meminfo /proc/loadavg /etc/os-release /proc/device-tree/model /sys/class/dmi/id/sys_vendor /sys/hypervisor/type "
    "/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq /sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq "
    "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor /sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count "
    "/sys/class/thermal/thermal_zone*/temp"
)
SCRIPT = (
    f'tell() {{ echo; echo "{MARK}$1"; cat "$2" 2>/dev/null; }}; '
    f'echo; echo "{MARK}/uname"; uname -r -m; tell /proc/stat /proc/stat; '
    f"for file in {FILES}; do [ -r $file ] && tell $file $file; done; "
    f'command -v vcgencmd >/dev/null 2>&1 && {{ echo; echo "{MARK}/vcgencmd"; vcgencmd get_throttled; }}; '
    "sleep 0.2 2>/dev/null || sleep 1; tell /proc/stat.after /proc/stat; exit 0"
)


def device_environment(link: DeviceLink) -> dict[str, Any]:
    """{"machine", "state"} of a device, as environment.py tells them on the device itself. Errors:
    InputError or LinkLost.
    """
    told = link.run(SCRIPT).decode(errors="replace")
    with tempfile.TemporaryDirectory(prefix="vitrim-snapshot-") as folder:
        for part in told.split("\n" + MARK)[1:]:
            name, _, content = part.partition("\n")
            # The names are those of SCRIPT, but a device is not believed to have kept to it.
            path = Path(
                folder, *(step for step in name.strip().split("/") if step not in ("", ".", ".."))
            )
            if path == Path(folder) or path.is_dir():
                continue
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content.replace("\0", ""))
            except OSError:
                continue
        # In a process of its own: the root that it reads from is the module's.
        done = subprocess.run(
            [sys.executable, str(Path(__file__).parents[1] / "local" / "environment.py"), folder],
            stdout=subprocess.PIPE,
            check=True,
            timeout=60,
        )
    found: dict[str, Any] = json.loads(done.stdout.decode())
    return found
