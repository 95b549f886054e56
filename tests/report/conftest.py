"""Runs whose curves nobody looks at as PNG."""

from blank_pictures import blank_pictures as blank_pictures
