/* SPDX-FileCopyrightText: The loopdev authors
 * SPDX-License-Identifier: Apache-2.0
 *
 * Carries packets between two TUN devices, and keeps each for a while or loses it.
 *
 * Packets are as large as TCP makes them before segmentation; what is checksummed and cut is
 * left to whom it concerns. So this takes little of the processors, as a real link takes none.
 *
 * Usage: relay ONE OTHER, which are devices to make. On standard input it takes lines
 * "DELAY LOSS": seconds in each direction, and a part of the packets.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#define LARGEST (68 << 10)
#define SMALL 2048
#define BATCH 64
#define TICK 250000 /* nanoseconds */
#define SECOND 1000000000LL

struct packet {
	struct packet *next;
	long long due;
	size_t length, room;
	char data[];
};

struct queue {
	struct packet *first, **last;
};

static struct packet *spare[2]; /* small ones, and large ones: the last used is the next */
static double delay, loss;

static long long now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * SECOND + time.tv_nsec;
}

static struct packet *get(int large)
{
	size_t room = large ? LARGEST : SMALL;
	struct packet *packet = spare[large];
	if (packet) {
		spare[large] = packet->next;
		return packet;
	}
	packet = malloc(sizeof(*packet) + room);
	if (!packet)
		abort();
	packet->room = room;
	return packet;
}

static void put(struct packet *packet)
{
	int large = packet->room == LARGEST;
	packet->next = spare[large];
	spare[large] = packet;
}

/* Most packets of one direction are small: they must not take a large one's room each. */
static struct packet *shrunk(struct packet *packet)
{
	if (packet->length > SMALL)
		return packet;
	struct packet *small = get(0);
	small->length = packet->length;
	memcpy(small->data, packet->data, packet->length);
	put(packet);
	return small;
}

static void take(int fd, struct queue *queue)
{
	for (int count = 0; count < BATCH; count++) {
		struct packet *packet = get(1);
		ssize_t length = read(fd, packet->data, packet->room);
		if (length <= 0 || drand48() < loss) {
			put(packet);
			if (length <= 0)
				return;
			continue;
		}
		packet->length = length;
		packet = shrunk(packet);
		packet->due = now() + (long long)(delay * SECOND);
		packet->next = NULL;
		*queue->last = packet;
		queue->last = &packet->next;
	}
}

static void deliver(int fd, struct queue *queue)
{
	while (queue->first && queue->first->due <= now()) {
		struct packet *packet = queue->first;
		queue->first = packet->next;
		if (!queue->first)
			queue->last = &queue->first;
		/* What it refuses is lost: it is not up yet, or it is no packet for it. */
		(void)!write(fd, packet->data, packet->length);
		put(packet);
	}
}

static int open_tun(const char *name)
{
	struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR};
	int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC | O_NONBLOCK);
	strncpy(request.ifr_name, name, IFNAMSIZ - 1);
	if (fd < 0 || ioctl(fd, TUNSETIFF, &request) < 0 ||
	    ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6) < 0) {
		perror(name);
		exit(1);
	}
	return fd;
}

/* To be woken for each packet, and again when it is due, costs more than carrying it does. */
static void wait_for(struct pollfd *fds, struct queue *queues)
{
	struct timespec tick = {0, TICK};
	int empty = !queues[0].first && !queues[1].first;
	if (!empty)
		nanosleep(&tick, NULL);
	ppoll(fds, 3, empty ? NULL : &(struct timespec){0, 0}, NULL);
}

static int obey(void)
{
	char line[256];
	if (!fgets(line, sizeof(line), stdin) || sscanf(line, "%lf %lf", &delay, &loss) != 2)
		return 0;
	return printf("done\n") > 0 && fflush(stdout) == 0;
}

int main(int argc, char **argv)
{
	struct queue queues[2];
	struct pollfd fds[3];
	if (argc != 3)
		return 2;
	for (int i = 0; i < 2; i++) {
		fds[i] = (struct pollfd){open_tun(argv[1 + i]), POLLIN, 0};
		queues[i] = (struct queue){NULL, &queues[i].first};
	}
	fds[2] = (struct pollfd){0, POLLIN, 0};
	printf("ready\n");
	fflush(stdout);
	for (;;) {
		wait_for(fds, queues);
		if (fds[2].revents && !obey())
			return 0;
		for (int i = 0; i < 2; i++) {
			if (fds[i].revents)
				take(fds[i].fd, &queues[i]);
			deliver(fds[1 - i].fd, &queues[i]);
		}
	}
}
