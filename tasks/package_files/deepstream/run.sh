#!/bin/sh
# HEADING
#
#   ./run.sh                  the CSI camera of a Jetson
#   ./run.sh VIDEO            a video file that the board can decode
#   WIDTH=1920 HEIGHT=1080 FPS=30 ./run.sh
set -e
cd -- "$(dirname -- "$0")"
WIDTH=${WIDTH:-1280} HEIGHT=${HEIGHT:-720} FPS=${FPS:-30}
SDK=${SDK:-/opt/nvidia/deepstream/deepstream}

if [ -f parse_boxes.cpp ] && [ ! -f libparse_boxes.so ]; then
    g++ -O2 -shared -fPIC -I"$SDK/sources/includes" -I/usr/local/cuda/include -o libparse_boxes.so parse_boxes.cpp
fi

if [ $# -eq 0 ]; then
    set -- nvarguscamerasrc ! "video/x-raw(memory:NVMM),width=$WIDTH,height=$HEIGHT,framerate=$FPS/1,format=NV12"
    LIVE=1
else
    case $1 in /*) ;; *) set -- "$OLDPWD/$1" ;; esac
    set -- uridecodebin "uri=file://$1" ! nvvideoconvert ! "video/x-raw(memory:NVMM),format=NV12"
    LIVE=0
fi

exec gst-launch-1.0 -v "$@" ! mux.sink_0 \
    nvstreammux name=mux batch-size=1 "width=$WIDTH" "height=$HEIGHT" "live-source=$LIVE" \
    ! nvinfer config-file-path=config_infer_primary.txt \
    ! nvvideoconvert ! nvdsosd ! nvvideoconvert \
    ! fpsdisplaysink text-overlay=false video-sink=fakesink sync=false
