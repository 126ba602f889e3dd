/* SPDX-FileCopyrightText: The loopdev authors
 * SPDX-License-Identifier: Apache-2.0
 *
 * The peer of attach() and detach(): the same system calls, in the same order, made by C.
 * It knows its device, as a process does that had one before, and has no error to recover from.
 *
 * Usage: cycle IMAGE COUNT; prints the median time of a cycle in nanoseconds.
 */
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/loop.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#ifndef BLKGETDISKSEQ
#define BLKGETDISKSEQ _IOR(0x12, 128, uint64_t)
#endif

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static int must(int result, const char *what)
{
	if (result < 0)
		die(what);
	return result;
}

static void cycle(const char *image, const char *path, const char *sysfs)
{
	static char head[8192];
	struct loop_config config = { 0 };
	struct loop_info64 info;
	struct stat status;
	uint64_t size, diskseq;

	must(stat(image, &status), image);
	int backing = must(open(image, O_RDWR | O_CLOEXEC | O_NOCTTY), image);
	must(fstat(backing, &status), image);
	must(pread(backing, head, sizeof head, 0), "pread");
	int fd = must(open(path, O_RDWR | O_CLOEXEC), path);
	must(fstat(fd, &status), path);
	must(stat(sysfs, &status), sysfs);
	config.fd = backing;
	config.info.lo_flags = LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO;
	snprintf((char *)config.info.lo_file_name, LO_NAME_SIZE, "%s", image);
	must(ioctl(fd, LOOP_CONFIGURE, &config), "LOOP_CONFIGURE");
	must(ioctl(fd, LOOP_GET_STATUS64, &info), "LOOP_GET_STATUS64");
	must(ioctl(fd, BLKGETSIZE64, &size), "BLKGETSIZE64");
	int pin = must(open(path, O_RDONLY | O_CLOEXEC), path);
	must(ioctl(fd, BLKGETDISKSEQ, &diskseq), "BLKGETDISKSEQ");
	close(fd);
	close(backing);

	int claim = must(open(path, O_RDONLY | O_EXCL | O_CLOEXEC), path);
	must(ioctl(claim, BLKGETDISKSEQ, &diskseq), "BLKGETDISKSEQ");
	must(fsync(claim), "fsync");
	close(pin);
	close(claim);
	must(stat(sysfs, &status), sysfs);
}

static int64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int compare(const void *a, const void *b)
{
	int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
	return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
	if (argc != 3)
		return 2;
	int count = atoi(argv[2]);
	char path[64], sysfs[64];
	int control = must(open("/dev/loop-control", O_RDWR | O_CLOEXEC), "loop-control");
	int number = must(ioctl(control, LOOP_CTL_GET_FREE), "LOOP_CTL_GET_FREE");
	close(control);
	snprintf(path, sizeof path, "/dev/loop%d", number);
	snprintf(sysfs, sizeof sysfs, "/sys/devices/virtual/block/loop%d", number);
	int64_t *times = calloc(count, sizeof *times);
	for (int i = 0; i < count; i++) {
		int64_t start = now();
		cycle(argv[1], path, sysfs);
		times[i] = now() - start;
	}
	qsort(times, count, sizeof *times, compare);
	printf("%lld\n", (long long)times[count / 2]);
	return 0;
}
