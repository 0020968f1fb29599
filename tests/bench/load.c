// SPDX-License-Identifier: BSD-3-Clause
/*
 * The load of tests/bench: HTTP requests at a constant rate, whatever the
 * answers do.  Request i is due at start + i / rate; if no connection is free
 * then, it waits, and the wait counts: latencies are from the due time, so that
 * a stall shows in every request it delayed and not in one.  With rate 0 the
 * next request follows the answer, back to back.
 *
 * One thread, one edge-triggered epoll set, as few system calls a request as
 * there can be: this program runs beside what is measured.  Prints one JSON
 * object.  Addresses are IPv4; answers are checked by status and length only.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "histogram.h"

#define NS	      1000000000ULL
#define HEAD_BYTES    1024
#define READ_BYTES    (256 * 1024)
#define EVENTS	      256
#define NUMBER_DIGITS 9
#define DRAIN_NS      (5 * NS)

enum state { FREE, CONNECTING, IDLE, BUSY, CLOSING };

struct connection {
	int fd;
	enum state state;
	int begun; /* a request is on its way, or waits for the handshake */
	uint64_t due_ns, number;
	size_t out; /* bytes of head and body sent so far */
	char head[HEAD_BYTES];
	size_t head_bytes; /* of an answer's head, so far */
	int64_t body_left; /* -1: the head is not complete */
	struct connection *next;
};

enum error { REFUSED, CLOSED_EARLY, BAD_ANSWER, NO_PORT, UNFINISHED, ERRORS };
static const char *const error_names[ERRORS] = {"refused", "closed_early", "bad_answer", "no_port",
						"unfinished"};

static struct {
	struct sockaddr_in to, from;
	unsigned addresses, connections;
	double rate;
	uint64_t requests, limit_ns;
	size_t answer_bytes, upload_bytes;
	int brief; /* a connection for every request */
} is;

static struct connection *available, **last_available = &available;
static struct histogram latency, lateness;
static uint64_t start_ns, last_answer_ns, answered, errors[ERRORS], failed, opened;
static char request[HEAD_BYTES], *number_at;
static size_t request_bytes;
static char *body, *sink;
static int set;

/* Whoever waited longest is next, so that all connections are in use. */
static void make_available(struct connection *one)
{
	one->state = one->fd < 0 ? FREE : IDLE;
	one->begun = 0;
	one->next = NULL;
	*last_available = one;
	last_available = &one->next;
}

static void set_free(struct connection *one)
{
	if (one->fd >= 0)
		close(one->fd);
	one->fd = -1;
	make_available(one);
}

static void fail(struct connection *one, enum error why)
{
	/* A kept connection is opened anew by the next request that needs one. */
	errors[why]++;
	failed += one->begun;
	set_free(one);
}

static void open_connection(struct connection *one)
{
	struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET};
	struct sockaddr_in from = is.from;
	int on = 1;

	one->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
	/* The port is chosen by connect(), among those free towards this server. */
	setsockopt(one->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof(on));
	if (is.upload_bytes)
		setsockopt(one->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
	from.sin_addr.s_addr = htonl(ntohl(from.sin_addr.s_addr) + opened++ % is.addresses);
	if (one->fd < 0 || bind(one->fd, (struct sockaddr *)&from, sizeof(from)) ||
	    (connect(one->fd, (struct sockaddr *)&is.to, sizeof(is.to)) && errno != EINPROGRESS)) {
		fail(one, NO_PORT);
		return;
	}
	one->state = CONNECTING;
	event.data.ptr = one;
	epoll_ctl(set, EPOLL_CTL_ADD, one->fd, &event);
}

static void write_more(struct connection *one)
{
	size_t all = request_bytes + is.upload_bytes;
	ssize_t sent;

	while (one->out < all) {
		if (one->out < request_bytes) {
			char line[HEAD_BYTES];

			memcpy(line, request, request_bytes);
			snprintf(line + (number_at - request), NUMBER_DIGITS + 1, "%0*llu",
				 NUMBER_DIGITS, (unsigned long long)one->number);
			line[number_at - request + NUMBER_DIGITS] = number_at[NUMBER_DIGITS];
			sent = send(one->fd, line + one->out, request_bytes - one->out,
				    MSG_NOSIGNAL | (is.upload_bytes ? MSG_MORE : 0));
		} else {
			sent = send(one->fd, body + (one->out - request_bytes), all - one->out,
				    MSG_NOSIGNAL);
		}
		if (sent < 0) {
			if (errno != EAGAIN)
				fail(one, CLOSED_EARLY);
			return;
		}
		one->out += sent;
	}
}

static void send_request(struct connection *one)
{
	one->state = BUSY;
	one->out = one->head_bytes = 0;
	one->body_left = -1;
	write_more(one);
}

/* False when no connection is to be had now. */
static int begin(uint64_t number, uint64_t due_ns)
{
	struct connection *one = available;

	if (!one)
		return 0;
	available = one->next;
	if (!available)
		last_available = &available;
	one->begun = 1;
	one->number = number;
	one->due_ns = due_ns;
	if (one->fd >= 0)
		send_request(one);
	else
		open_connection(one);
	return 1;
}

static void answer_complete(struct connection *one)
{
	last_answer_ns = now();
	record(&latency, last_answer_ns - one->due_ns);
	answered++;
	if (is.brief)
		one->state = CLOSING; /* the server closes first, as it was asked to */
	else
		make_available(one);
}

/* The answer's head is complete: how much body follows, or -1 for an answer that is none. */
static int64_t parse_head(struct connection *one, const char *end)
{
	static const char length[] = "\r\nContent-Length: ";
	const char *at;

	if (one->head_bytes < 12 || memcmp(one->head, "HTTP/1.1 200", 12))
		return -1;
	at = memmem(one->head, end - one->head, length, sizeof(length) - 1);
	return at ? strtoll(at + sizeof(length) - 1, NULL, 10) : -1;
}

static void take(struct connection *one, const char *data, size_t bytes)
{
	if (one->body_left < 0) {
		size_t room = HEAD_BYTES - 1 - one->head_bytes, part = bytes < room ? bytes : room;
		size_t before = one->head_bytes;
		const char *end;

		memcpy(one->head + before, data, part);
		one->head_bytes += part;
		end = memmem(one->head, one->head_bytes, "\r\n\r\n", 4);
		if (!end) {
			if (part == room)
				fail(one, BAD_ANSWER);
			return;
		}
		one->body_left = parse_head(one, end);
		if (one->body_left != (int64_t)is.answer_bytes) {
			fail(one, BAD_ANSWER);
			return;
		}
		bytes -= end + 4 - (one->head + before);
	}
	one->body_left -= bytes;
	if (one->body_left < 0 || (!one->body_left && one->out < request_bytes + is.upload_bytes))
		fail(one, BAD_ANSWER);
	else if (!one->body_left)
		answer_complete(one);
}

static void read_more(struct connection *one)
{
	ssize_t bytes;

	do {
		bytes = recv(one->fd, sink, READ_BYTES, 0);
		if (bytes > 0)
			take(one, sink, bytes);
		else if (!bytes || errno != EAGAIN)
			fail(one, CLOSED_EARLY);
		/* A short read has emptied the socket: the next byte makes an event. */
	} while (one->state == BUSY && bytes == READ_BYTES);
}

static void act(struct connection *one, uint32_t events)
{
	if (one->state == CONNECTING) {
		if (events & (EPOLLERR | EPOLLHUP)) {
			fail(one, REFUSED);
			return;
		}
		if (!(events & EPOLLOUT))
			return;
		if (one->begun)
			send_request(one);
		else
			make_available(one);
		return;
	}
	if (one->state == BUSY && events & EPOLLOUT)
		write_more(one);
	if (one->state == BUSY && events & EPOLLIN)
		read_more(one);
	if (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) {
		if (one->state == CLOSING)
			set_free(one);
		else if (one->state == BUSY)
			fail(one, CLOSED_EARLY);
		/* An idle one that the server closed is found out by its next request. */
	}
}

static void wait_for_events(uint64_t until_ns, uint64_t now_ns)
{
	struct epoll_event events[EVENTS];
	uint64_t wait_ns = until_ns > now_ns ? until_ns - now_ns : 0;
	struct timespec wait = {wait_ns / NS, wait_ns % NS};
	int count = epoll_pwait2(set, events, EVENTS, &wait, NULL);

	for (int at = 0; at < count; at++)
		act(events[at].data.ptr, events[at].events);
}

static void open_all(struct connection *all)
{
	uint64_t limit_ns = now() + DRAIN_NS;
	unsigned at, ready = 0;

	for (at = 0; at < is.connections; at++)
		open_connection(&all[at]);
	while (ready < is.connections && now() < limit_ns) {
		wait_for_events(now() + NS / 100, now());
		for (at = ready = 0; at < is.connections; at++)
			ready += all[at].state != CONNECTING;
	}
}

static void run(void)
{
	uint64_t next = 0, now_ns = now(), limit_ns;

	start_ns = now_ns + NS / 1000;
	limit_ns = start_ns + is.limit_ns;
	while (answered + failed < is.requests && now_ns < limit_ns) {
		uint64_t until_ns = now_ns + NS / 10;

		while (next < is.requests) {
			uint64_t due_ns = is.rate ? start_ns + next * (NS / is.rate) : now_ns;

			if (due_ns > now_ns) {
				if (due_ns < until_ns)
					until_ns = due_ns;
				break;
			}
			if (!begin(next, due_ns))
				break;
			record(&lateness, now_ns - due_ns);
			next++;
		}
		wait_for_events(until_ns, now_ns);
		now_ns = now();
	}
	errors[UNFINISHED] += is.requests - answered - failed;
}

static void print(void)
{
	uint64_t due_ns = is.rate ? start_ns + (is.requests - 1) * (NS / is.rate) : last_answer_ns;
	struct timespec cpu;
	unsigned at;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &cpu);
	printf("{\"requests\": %llu, \"answered\": %llu, \"seconds\": %.6f, \"behind_s\": %.6f, ",
	       (unsigned long long)is.requests, (unsigned long long)answered,
	       answered ? (last_answer_ns - start_ns) / 1e9 : 0,
	       last_answer_ns > due_ns ? (last_answer_ns - due_ns) / 1e9 : 0);
	printf("\"cpu_s\": %.6f, \"errors\": {", cpu.tv_sec + cpu.tv_nsec / 1e9);
	for (at = 0; at < ERRORS; at++)
		printf("%s\"%s\": %llu", at ? ", " : "", error_names[at],
		       (unsigned long long)errors[at]);
	printf("}, \"latency_us\": ");
	print_histogram(&latency);
	printf(", \"late_us\": ");
	print_histogram(&lateness);
	printf("}\n");
}

static void build_request(void)
{
	request_bytes = snprintf(
		request, sizeof(request), "%s /%c/%zu?n=%0*d HTTP/1.1\r\nHost: lab\r\n%s",
		is.upload_bytes ? "POST" : "GET", is.upload_bytes ? 'u' : 'b', is.answer_bytes,
		NUMBER_DIGITS, 0, is.brief ? "Connection: close\r\n" : "");
	number_at = strstr(request, "?n=") + 3;
	if (is.upload_bytes)
		request_bytes += sprintf(request + request_bytes, "Content-Length: %zu\r\n",
					 is.upload_bytes);
	request_bytes += sprintf(request + request_bytes, "\r\n");
}

int main(int count, char **word)
{
	struct rlimit files = {65536, 65536};
	struct connection *all;
	unsigned at;

	if (count != 12)
		return 2; /* see loads.py */
	is.to.sin_family = is.from.sin_family = AF_INET;
	is.to.sin_port = htons(atoi(word[2]));
	is.addresses = atoi(word[4]);
	is.brief = !strcmp(word[5], "short");
	is.connections = atoi(word[6]);
	is.rate = atof(word[7]);
	is.requests = strtoull(word[8], NULL, 10);
	is.answer_bytes = strtoull(word[9], NULL, 10);
	is.upload_bytes = strtoull(word[10], NULL, 10);
	is.limit_ns = atof(word[11]) * NS;
	inet_aton(word[1], &is.to.sin_addr);
	inet_aton(word[3], &is.from.sin_addr);
	setrlimit(RLIMIT_NOFILE, &files);
	prctl(PR_SET_TIMERSLACK, 1); /* 50 us otherwise, which would be latency */
	build_request();
	body = malloc(is.upload_bytes + 1);
	sink = malloc(READ_BYTES);
	all = calloc(is.connections, sizeof(*all));
	set = epoll_create1(0);
	if (!body || !sink || !all || set < 0) {
		perror("load");
		return 1;
	}
	memset(body, 'u', is.upload_bytes);
	for (at = 0; at < is.connections; at++) {
		all[at].fd = -1;
		if (is.brief)
			make_available(&all[at]);
	}
	if (!is.brief)
		open_all(all);
	run();
	print();
	return 0;
}
