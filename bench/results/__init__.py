"""What was measured: samples, statistics, comparisons, warnings."""
