#!/bin/bash
# Make the pictures in `files/` with encoders that users have; `expected.toml` says what the worker sends of each.
#
#   tests/corpus/make.sh            makes all again; the tests need only the committed files
#
# Debian 12: apt-get install --no-install-recommends imagemagick graphicsmagick libjpeg-turbo-progs libjpeg-tools
#   libheif-examples libavif-bin libvips-tools ffmpeg libjxl-tools webp libtiff-tools libopenjp2-tools ghostscript
#   libimage-exiftool-perl qpdf optipng pngcrush gifsicle netpbm img2pdf apngasm icc-profiles-free fonts-urw-base35
# and the project's .venv for `edit.py`, which makes what no tool makes. Other versions of the tools write other
# bytes; the pictures stay alike.
#
# The picture has 120 × 80 pixels: red, green, blue and yellow quarters, and grey in the middle.
set -euo pipefail
export PATH=/usr/bin:$PATH SOURCE_DATE_EPOCH=0 TZ=UTC LC_ALL=C
cd "$(dirname "$0")"
root=$(cd ../.. && pwd)
out=$PWD/files
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
edit() { PYTHONPATH=$root "$root/.venv/bin/python" -m tests.corpus.edit "$@"; }
magick() { convert "$@" 2>&1 | sed '/warning/d' >&2; }
quiet() { "$@" >"$work/errors" 2>&1 || { cat "$work/errors" >&2; return 1; }; }
strip=(-strip -define png:exclude-chunks=date,time)
icc=/usr/share/color/icc/ghostscript
mkdir -p "$out"
rm -f "$out"/*
cd "$work"

# --- The picture in the forms that the encoders read
draw() { # width height top-left top-right bottom-left bottom-right file
  magick -size "$1x$2" "xc:$3" -fill "$4" -draw "rectangle $(($1 / 2)),0 $1,$2" \
    -fill "$5" -draw "rectangle 0,$(($2 / 2)) $(($1 / 2 - 1)),$2" \
    -fill "$6" -draw "rectangle $(($1 / 2)),$(($2 / 2)) $1,$2" \
    -fill '#808080' -draw "rectangle $(($1 * 2 / 5)),$(($2 * 2 / 5)) $(($1 * 3 / 5 - 1)),$(($2 * 3 / 5 - 1))" \
    -depth 8 "${strip[@]}" "PNG24:$7"
}
red='#d82828' green='#28a838' blue='#2840d0' yellow='#e0c828'
draw 120 80 $red $green $blue $yellow picture.png
draw 120 80 $blue $yellow $green $red second.png
draw 60 40 $red $green $blue $yellow half.png
draw 60 40 $green $blue $yellow $red small.png
draw 24 16 $yellow $red $green $blue thumbnail.png
draw 256 128 $red $green $blue $yellow large.png
magick picture.png picture.ppm
magick picture.png -colorspace Gray -depth 8 grey.pgm
magick grey.pgm "${strip[@]}" -define png:color-type=0 grey.png
magick picture.png -compress none picture.tif
magick half.png half.ppm
# A transparent quarter: top left.
magick picture.png -alpha set -region 60x40+0+0 -alpha transparent +region "${strip[@]}" PNG32:hole.png
magick hole.png -colorspace Gray "${strip[@]}" grey-hole.png
# Two levels: right half white.
magick -size 120x80 xc:black -fill white -draw 'rectangle 60,0 120,80' -depth 1 "${strip[@]}" lines.png
# 16 bits a sample.
magick picture.png -depth 16 "${strip[@]}" -define png:bit-depth=16 deep.png
# The same colours in wider colour spaces, which look wrong if the profile is ignored.
for space in a98 rommrgb; do
  magick picture.png -profile $icc/srgb.icc -profile $icc/$space.icc PNG24:$space.png
done
# Stored so that a viewer that applies the orientation shows the picture.
turns=("" "" -flop "-rotate 180" -flip -transpose "-rotate 270" -transverse "-rotate 90")
for number in 2 3 4 5 6 7 8; do
  # shellcheck disable=SC2086
  magick picture.png ${turns[$number]} +repage "${strip[@]}" PNG24:lying-$number.png
  magick lying-$number.png lying-$number.ppm
done
cjpeg -quality 92 -sample 1x1 -outfile thumbnail.jpg <(convert thumbnail.png ppm:-)
exif() { exiftool -q -q -n -overwrite_original "$@"; }
ff() { ffmpeg -nostdin -loglevel error -bitexact -y "$@"; }

page() { # quarters on a page of the size $1 $2, in points
  cat <<PS
<</PageSize [$1 $2]>> setpagedevice
0.847 0.157 0.157 setrgbcolor 0 $2 2 div $1 2 div $2 2 div rectfill
0.157 0.659 0.220 setrgbcolor $1 2 div $2 2 div $1 2 div $2 2 div rectfill
0.157 0.251 0.816 setrgbcolor 0 0 $1 2 div $2 2 div rectfill
0.878 0.784 0.157 setrgbcolor $1 2 div 0 $1 2 div $2 2 div rectfill
0.502 setgray $1 0.4 mul $2 0.4 mul $1 0.2 mul $2 0.2 mul rectfill
PS
}

# --- JPEG
jpeg() { cjpeg -quality 92 "${@:2}" -outfile "$out/jpeg-$1.jpg" picture.ppm; }
jpeg baseline-420 -baseline -sample 2x2
jpeg 411 -sample 4x1
jpeg progressive -progressive -sample 2x2
jpeg arithmetic -arithmetic
jpeg restart-markers -restart 1B
jpeg grey -grayscale
printf '0;1;2;' >scans.txt
jpeg non-interleaved -scans scans.txt
jpeg adobe-rgb-components -rgb
jpegtran -crop 90x60+14+9 -copy none -outfile "$out/jpeg-cropped-by-jpegtran.jpg" "$out/jpeg-baseline-420.jpg"
cjpeg -quality 92 -sample 1x1 -icc $icc/a98.icc -outfile "$out/jpeg-icc-a98.jpg" <(convert a98.png ppm:-)
cjpeg -quality 92 -sample 1x1 -icc $icc/rommrgb.icc -outfile "$out/jpeg-icc-prophoto-orientation-3.jpg" \
  <(convert rommrgb.png -rotate 180 ppm:-)
exif -Orientation=3 "$out/jpeg-icc-prophoto-orientation-3.jpg"
for number in 2 3 4 5 6 7 8; do
  for order in II MM; do
    [[ $order = MM && $number =~ [23478] ]] && continue
    file=$out/jpeg-orientation-$number-$order.jpg
    cjpeg -quality 92 -outfile "$file" lying-$number.ppm
    exif -ExifByteOrder=$order -Orientation=$number -Make=Camera "$file"
  done
done
cp "$out/jpeg-baseline-420.jpg" "$out/jpeg-xmp-orientation-only.jpg"
exif -XMP-tiff:Orientation=6 "$out/jpeg-xmp-orientation-only.jpg"
cp "$out/jpeg-orientation-6-MM.jpg" "$out/jpeg-orientation-6-with-thumbnail.jpg"
exif "-ThumbnailImage<=thumbnail.jpg" "$out/jpeg-orientation-6-with-thumbnail.jpg"
magick picture.png -colorspace CMYK -quality 92 -sampling-factor 1x1 "${strip[@]}" "$out/jpeg-ycck.jpg"
magick picture.png -colorspace CMYK -compress LZW cmyk.tif
vips jpegsave cmyk.tif "$out/jpeg-cmyk.jpg" --Q 92 --strip --subsample-mode off
edit without-adobe "$out/jpeg-cmyk.jpg" "$out/jpeg-cmyk-without-adobe.jpg"
magick picture.png -profile $icc/srgb.icc -profile $icc/ps_cmyk.icc -quality 92 -sampling-factor 1x1 \
  "$out/jpeg-ycck-icc.jpg"
convert picture.png -depth 16 ppm:- | pnmdepth 4095 >twelve.ppm
quiet /usr/bin/jpeg -q 92 twelve.ppm "$out/jpeg-12-bit.jpg"
quiet /usr/bin/jpeg -q 92 -n picture.ppm "$out/jpeg-dnl.jpg"
quiet /usr/bin/jpeg -p -c picture.ppm "$out/jpeg-lossless.jpg"
edit mpf "$out/jpeg-baseline-420.jpg" thumbnail.jpg "$out/jpeg-mpf.jpg"
ff -framerate 5 -loop 1 -t 1 -i picture.png -c:v libx264 -pix_fmt yuv420p clip.mp4
cat "$out/jpeg-baseline-420.jpg" clip.mp4 >"$out/jpeg-motion-photo.jpg"
ff -i picture.png -c:v mjpeg -q:v 2 -pix_fmt yuvj420p -huffman default -f image2 -update 1 "$out/jpeg-ffmpeg.jpg"
edit without-huffman-tables "$out/jpeg-ffmpeg.jpg" "$out/jpeg-without-huffman-tables.jpg"

# --- PNG
png() { magick "$1" "${@:3}" "${strip[@]}" "$out/png-$2.png"; }
png picture.png rgb-8 -define png:color-type=2
png hole.png rgba-8 -define png:color-type=6
png lines.png grey-1 -define png:color-type=0 -define png:bit-depth=1
png grey.png grey-4 -define png:color-type=0 -define png:bit-depth=4 -colors 5 -depth 4
png grey.png grey-16 -define png:color-type=0 -define png:bit-depth=16 -depth 16
png grey-hole.png grey-alpha-8 -define png:color-type=4 -define png:bit-depth=8
png grey-hole.png grey-alpha-16 -define png:color-type=4 -define png:bit-depth=16
png picture.png rgb-16 -define png:color-type=2 -define png:bit-depth=16
png picture.png palette-4 -define png:color-type=3 -define png:bit-depth=4
png lines.png palette-1 -define png:color-type=3 -define png:bit-depth=1
magick hole.png "${strip[@]}" PNG8:"$out/png-palette-transparent.png"
magick hole.png -profile $icc/srgb.icc -profile $icc/a98.icc -define png:exclude-chunks=date,time,exif PNG8:"$out/png-palette-transparent-icc.png"
pnmtopng -force -transparent "=rgb:d8d8/2828/2828" <(pnmdepth 65535 picture.ppm) >"$out/png-rgb-16-transparent-colour.png" 2>/dev/null
pngtopnm -mix -background '#ffffff' picture.png | pnmtopng -force -transparent "=$red" >"$out/png-rgb-transparent-colour.png" 2>/dev/null
pnmtopng -transparent "=$(pngtopnm grey.png | pamcut -left 5 -top 5 -width 1 -height 1 | pamtopnm | tail -c 1 | xxd -p | sed 's/\(..\)/#\1\1\1/')" \
  <grey.pgm >"$out/png-grey-transparent-colour.png" 2>/dev/null
quiet optipng -quiet -i 1 -nc -nb -np -out "$out/png-interlaced.png" picture.png
magick deep.png -interlace PNG "${strip[@]}" -define png:color-type=2 -define png:bit-depth=16 "$out/png-rgb-16-interlaced.png"
quiet pngcrush -q -g 0.45455 picture.png "$out/png-pngcrush-gama.png"
convert a98.png -define png:exclude-chunks=date,time,exif "$out/png-icc-a98.png"
convert rommrgb.png -depth 16 -define png:bit-depth=16 -define png:exclude-chunks=date,time,exif "$out/png-16-icc-prophoto.png"
cp lying-6.png "$out/png-exif-orientation-6.png"
exif -Orientation=6 "$out/png-exif-orientation-6.png"
edit exif-last "$out/png-exif-orientation-6.png" "$out/png-exif-orientation-6-after-idat.png"
cp lying-8.png "$out/png-xmp-orientation-only.png"
exif -XMP-tiff:Orientation=8 "$out/png-xmp-orientation-only.png"
ff -framerate 5 -i picture.png -framerate 5 -i second.png -filter_complex concat=n=2 -f apng -plays 0 "$out/png-apng-ffmpeg.png"
cp picture.png frame0.png
cp second.png frame1.png
quiet apngasm "$out/png-apng-apngasm.png" frame0.png 1 5

# --- GIF
magick picture.png "${strip[@]}" GIF87:"$out/gif-87a.gif"
magick picture.png -interlace GIF "${strip[@]}" "$out/gif-interlaced.gif"
magick hole.png "${strip[@]}" "$out/gif-transparent.gif"
ff -framerate 5 -i picture.png -framerate 5 -i second.png \
  -filter_complex 'concat=n=2,split[a][b];[a]palettegen[p];[b][p]paletteuse' -f gif "$out/gif-ffmpeg-animated.gif"
magick -delay 20 picture.png -page +60+40 small.png -loop 0 "$out/gif-animated-small-second-frame.gif"
magick -delay 20 -page 120x80+60+40 small.png -page +0+0 second.png -loop 0 "$out/gif-animated-small-first-frame.gif"
magick -dispose previous -delay 20 hole.png second.png -loop 0 "$out/gif-animated-transparent.gif"
gifsicle --no-warnings -O3 --colors 8 "$out/gif-ffmpeg-animated.gif" -o "$out/gif-gifsicle.gif"
vips gifsave picture.png "$out/gif-vips.gif"

# --- WebP
cwebp -quiet -q 90 picture.png -o "$out/webp-lossy.webp"
cwebp -quiet -lossless picture.png -o "$out/webp-lossless.webp"
cwebp -quiet -q 90 hole.png -o "$out/webp-lossy-alpha.webp"
cwebp -quiet -q 90 -metadata icc a98.png -o "$out/webp-icc-a98.webp"
cwebp -quiet -q 90 lying-6.png -o "$out/webp-exif-orientation-6.webp"
exif -Orientation=6 "$out/webp-exif-orientation-6.webp"
cwebp -quiet -q 90 picture.png -o "$out/webp-xmp-orientation-only.webp"
exif -XMP-tiff:Orientation=6 "$out/webp-xmp-orientation-only.webp"
cwebp -quiet -q 90 picture.png -o "$out/webp-exif-orientation-1.webp"
exif -Orientation=1 "$out/webp-exif-orientation-1.webp"
quiet gif2webp -quiet "$out/gif-animated-small-first-frame.gif" -o "$out/webp-gif2webp-small-first-frame.webp"
quiet img2webp -lossy -q 90 -d 100 picture.png second.png -o "$out/webp-img2webp.webp"
ff -framerate 5 -i picture.png -framerate 5 -i second.png -filter_complex concat=n=2 -c:v libwebp_anim -q:v 90 "$out/webp-ffmpeg.webp"

# --- TIFF
tiff() { tiffcp "${@:2}" picture.tif "$out/tiff-$1.tif"; }
magick half.png -compress none "$out/tiff-none.tif"
tiff lzw-predictor -c lzw:2 -r 16
tiff packbits -c packbits -p separate
tiff jpeg -c jpeg:92 -r 16
tiff tiled -c lzw -t -w 32 -l 32
tiff planar-tiled -c zip -p separate -t -w 48 -l 32
tiff bigtiff -8 -c lzw
tiff bigtiff-big-endian -8 -B -c zip
magick lines.png -compress Group4 -define quantum:polarity=min-is-white "$out/tiff-g4.tif"
magick lines.png -compress Fax -define quantum:polarity=min-is-black "$out/tiff-g3-min-is-black.tif"
magick picture.png -colorspace CMYK -compress LZW "$out/tiff-cmyk.tif"
magick picture.png -profile $icc/srgb.icc -profile $icc/ps_cmyk.icc -compress LZW "$out/tiff-cmyk-icc.tif"
magick picture.png -colorspace Lab -compress LZW "$out/tiff-lab.tif"
magick picture.png -colorspace Lab -depth 16 -compress LZW "$out/tiff-lab-16.tif"
magick deep.png -depth 16 -interlace plane -compress Zip "$out/tiff-rgb-16-planar.tif"
magick deep.png -depth 16 -endian MSB -compress LZW "$out/tiff-rgb-16-big-endian.tif"
magick grey.png -depth 16 -compress LZW "$out/tiff-grey-16.tif"
magick grey.png -negate -depth 16 -define quantum:polarity=min-is-white -compress LZW "$out/tiff-grey-16-min-is-white.tif"
magick grey.png -negate -define quantum:polarity=min-is-white -compress LZW "$out/tiff-grey-8-min-is-white.tif"
magick grey.png -depth 12 -compress LZW "$out/tiff-grey-12.tif"
magick grey.png -colors 5 -depth 4 -compress LZW "$out/tiff-grey-4.tif"
vips cast grey.png "$out/tiff-grey-float.tif[compression=deflate]" float
vips cast picture.png "$out/tiff-rgb-float.tif[compression=deflate]" float
magick picture.png -type Palette -compress LZW "$out/tiff-palette.tif"
magick hole.png -compress LZW "$out/tiff-alpha.tif"
magick hole.png -define tiff:alpha=associated -compress LZW "$out/tiff-alpha-associated.tif"
magick grey-hole.png -compress LZW "$out/tiff-grey-alpha.tif"
magick a98.png -compress LZW "$out/tiff-icc-a98.tif"
for number in 5 6; do
  magick lying-$number.png -compress LZW "$out/tiff-orientation-$number.tif"
  tiffset -s 274 $number "$out/tiff-orientation-$number.tif"
done
tiffcp picture.tif "$out/tiff-orientation-6.tif" two.tif
tiffcp -c lzw two.tif "$out/tiff-second-page-turned.tif"
magick picture.png -colorspace CMYK -compress JPEG -quality 92 "$out/tiff-cmyk-jpeg.tif"
magick picture.png -profile $icc/srgb.icc -profile /usr/share/color/icc/Gray.icc -compress LZW "$out/tiff-grey-icc.tif"
magick picture.png second.png lines.png -compress LZW "$out/tiff-three-pages.tif"
magick thumbnail.png -compress LZW thumbnail.tif
magick picture.png -compress LZW first.tif
tiffcp first.tif thumbnail.tif "$out/tiff-thumbnail-second.tif"
tiffset -d 1 -s 254 1 "$out/tiff-thumbnail-second.tif"
tiffcp thumbnail.tif first.tif "$out/tiff-thumbnail-first.tif"
tiffset -d 0 -s 254 1 "$out/tiff-thumbnail-first.tif"
tiffcp first.tif "$out/tiff-g4.tif" "$out/tiff-mask-second.tif"
tiffset -d 1 -s 254 4 "$out/tiff-mask-second.tif"
vips tiffsave large.png "$out/tiff-vips-pyramid.tif" --tile --pyramid --compression deflate \
  --tile-width 64 --tile-height 64
vips tiffsave large.png "$out/tiff-vips-pyramid-subifd.tif" --tile --pyramid --subifd --compression deflate \
  --tile-width 64 --tile-height 64
edit dng thumbnail.tif "$out/tiff-dng.dng"

# --- BMP
magick lines.png -type Bilevel BMP3:"$out/bmp-1.bmp"
ppmtobmp -bpp 4 half.ppm >"$out/bmp-4.bmp" 2>/dev/null
ppmtobmp -os2 -bpp 8 half.ppm >"$out/bmp-os2-8.bmp" 2>/dev/null
ppmtobmp -windows -bpp 24 half.ppm >"$out/bmp-24.bmp" 2>/dev/null
magick picture.png -compress RLE -type Palette BMP3:"$out/bmp-rle8.bmp"
ff -i half.png -c:v bmp -pix_fmt rgb565le "$out/bmp-16-565.bmp"
magick hole.png -scale 50% BMP:"$out/bmp-32-v4-alpha.bmp"
edit top-down "$out/bmp-24.bmp" "$out/bmp-24-top-down.bmp"

# --- JPEG 2000
jp2() { quiet opj_compress -i "$1" -o "$out/jp2-$2" "${@:3}"; }
jp2 picture.png lossless.jp2
jp2 picture.png codestream.j2k -r 8
jp2 deep.png 16-bit.jp2
pnmdepth 4095 grey.pgm >twelve.pgm
jp2 twelve.pgm grey-12.jp2
jp2 hole.png alpha.jp2
ff -i picture.png -pix_fmt yuvj420p -f rawvideo picture.raw
quiet opj_compress -i picture.raw -F '120,80,3,8,u@1x1:2x2:2x2' -o "$out/jp2-ycc-420.jp2" -n 1
vips jp2ksave picture.png "$out/jp2-vips.jp2" --lossless
ff -i picture.png -c:v jpeg2000 -f image2 -update 1 "$out/jp2-ffmpeg.jp2"

# --- HEIC
heic() { quiet heif-enc -q 90 "${@:3}" -o "$out/heic-$2.heic" "$1"; }
heic picture.png 8-bit
heic deep.png 10-bit -b 10
heic hole.png alpha
heic picture.png 444-lossless -L -p chroma=444 --matrix_coefficients=0
heic picture.png thumbnail -t 40
heic a98.png icc-a98
magick picture.png -crop 119x79+0+0 +repage "${strip[@]}" PNG24:odd.png
heic odd.png odd-size
heic "$out/jpeg-orientation-6-II.jpg" orientation-6-by-heif-enc
quiet heif-enc -q 90 -o "$out/heic-two-images.heic" picture.png second.png
edit heif-transform "$out/heic-orientation-6-by-heif-enc.heic" "$out/heic-irot-3-and-orientation-6.heic" irot 3
edit heif-transform "$out/heic-8-bit.heic" "$out/heic-irot-1.heic" irot 1
edit heif-transform "$out/heic-8-bit.heic" "$out/heic-imir-0.heic" imir 0
ff -framerate 5 -i picture.png -framerate 5 -i second.png -filter_complex concat=n=2 -c:v libx265 -x265-params log-level=none \
  -pix_fmt yuv420p -tag:v hvc1 -brand hevc -f mp4 "$out/heic-sequence-ffmpeg.heic"
for part in 0 1; do
  magick large.png -crop 128x128+$((part * 128))+0 +repage "${strip[@]}" PNG24:part-$part.png
done
quiet heif-enc -q 90 -o parts.heic part-0.png part-1.png
edit heif-grid parts.heic "$out/heic-grid.heic"

# --- AVIF
avif() { quiet avifenc -j 1 -s 8 --min 8 --max 16 "${@:3}" "$1" "$out/avif-$2.avif"; }
avif picture.png 8-bit-444
avif picture.png 10-bit -d 10
avif picture.png limited-range -r limited
avif hole.png alpha
avif hole.png alpha-premultiplied -p
avif picture.png irot-1 --irot 1
avif picture.png imir-0 --imir 0
avif picture.png irot-3-imir-1 --irot 3 --imir 1
avif a98.png icc-a98
avif large.png grid -g 2x1
ff -framerate 5 -i picture.png -framerate 5 -i second.png -filter_complex concat=n=2 -pix_fmt yuv444p -strict -1 frames.y4m
avif frames.y4m animated
ff -i picture.png -c:v libaom-av1 -still-picture 1 -crf 20 -pix_fmt yuv420p "$out/avif-ffmpeg.avif"
cp lying-6.png tagged.png
exif -Orientation=6 tagged.png
avif tagged.png orientation-6-by-avifenc

# --- PDF
pdf() { gs -q -dNOSAFER -dBATCH -dNOPAUSE -sDEVICE=pdfwrite "${@:2}" -o "$out/pdf-$1.pdf" "$1.ps"; }
# 57.6 points are 120 pixels at 150 dots per inch.
page 57.6 38.4 >quarters.ps
{ cat quarters.ps; echo '/Helvetica findfont 6 scalefont setfont 0 setgray 4 19 moveto (Text) show showpage'; } >text.ps
pdf text
{ cat quarters.ps; echo showpage; } >vector.ps
pdf vector
cp vector.ps cmyk.ps
pdf cmyk -sColorConversionStrategy=CMYK -sProcessColorModel=DeviceCMYK
{ page 57.6 38.4; echo showpage; page 38.4 57.6; echo showpage; page 96 48; echo showpage; } >page-sizes.ps
pdf page-sizes
{ cat quarters.ps; cat <<'PS'; } >annotation.ps
[/Subtype /Square /Rect [20 12 38 27] /IC [1 1 1] /C [1 1 1] /ANN pdfmark showpage
PS
pdf annotation
{ page 115.2 76.8; echo '[/CropBox [28.8 19.2 86.4 57.6] /PAGE pdfmark showpage'; } >cropped.ps
pdf cropped
qpdf --deterministic-id --rotate=90 "$out/pdf-vector.pdf" "$out/pdf-rotated-90.pdf"
qpdf --deterministic-id --linearize --object-streams=generate "$out/pdf-page-sizes.pdf" "$out/pdf-linearized.pdf"
qpdf --static-id --encrypt '' owner 256 -- "$out/pdf-vector.pdf" "$out/pdf-encrypted-without-password.pdf"
qpdf --static-id --encrypt user owner 256 -- "$out/pdf-vector.pdf" "$out/pdf-encrypted.pdf"
sed 's/^startxref$/startxref\n7/' "$out/pdf-vector.pdf" >"$out/pdf-damaged-xref.pdf"
qpdf --static-id --qdf "$out/pdf-vector.pdf" plain.pdf
sed '/\/MediaBox/,/\]/ { s/^    0$/    -10/ ; s/57.6/47.6/ ; s/38.4/28.4/ }' plain.pdf | fix-qdf >"$out/pdf-negative-origin.pdf"
sed 's|^  /MediaBox \[|  /UserUnit 2\n&|' plain.pdf | fix-qdf >"$out/pdf-user-unit.pdf"
edit pdf-form plain.pdf form.pdf
fix-qdf form.pdf >"$out/pdf-form-field.pdf"
img2pdf --nodate --imgsize 57.6x38.4 "$out/jpeg-baseline-420.jpg" -o "$out/pdf-scan-jpeg.pdf"
img2pdf --nodate --imgsize 38.4x57.6 "$out/jpeg-orientation-6-II.jpg" -o "$out/pdf-scan-orientation-6.pdf"
img2pdf --nodate --imgsize 57.6x38.4 "$out/jpeg-cmyk.jpg" -o "$out/pdf-scan-cmyk.pdf"
img2pdf --nodate --imgsize 57.6x38.4 "$out/tiff-g4.tif" -o "$out/pdf-scan-g4.pdf"
img2pdf --nodate --imgsize 57.6x38.4 "$out/jp2-lossless.jp2" -o "$out/pdf-scan-jp2.pdf"
gm convert -density 150 -units PixelsPerInch picture.png "$out/pdf-graphicsmagick.pdf"

# --- Refused
cjxl --quiet picture.png "$out/refused-codestream.jxl"
cjxl --quiet --container=1 picture.png "$out/refused-container.jxl"
magick picture.png "$out/refused.psd"
magick picture.png -resize 32x32 "$out/refused.ico"
cp clip.mp4 "$out/refused.mp4"
ff -i clip.mp4 -c copy -f mov "$out/refused.mov"
echo '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>' >"$out/refused.svg"
head -c 800 "$out/jpeg-baseline-420.jpg" >"$out/refused-truncated.jpg"
head -c 250 "$out/png-rgb-8.png" >"$out/refused-truncated.png"
head -c 400 "$out/heic-8-bit.heic" >"$out/refused-truncated.heic"
