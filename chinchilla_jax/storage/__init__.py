"""Where runs and stores lie: folders on disks, and objects in buckets (docs/storage.md)."""
