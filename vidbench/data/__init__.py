"""What models are fed with: video files, optical flow, and tasks made on the fly."""
