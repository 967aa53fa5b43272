"""What compaction and mask learning cost."""
