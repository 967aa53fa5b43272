"""Results of measurements: samples, statistics, comparisons and warnings."""
