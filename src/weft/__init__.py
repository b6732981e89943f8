"""weft: trained networks made smaller and faster by re-weaving their weights from structured matrices."""
