"""From a video and an edited picture to a job: where the edit is, where it goes, and the files that a job needs."""
