"""What every package may import: errors, atomic files, strict JSON, console output, compilers."""
