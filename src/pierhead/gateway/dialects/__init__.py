"""The dialects that clients speak: one file each, pure; who sends and receives is the relay's business."""
