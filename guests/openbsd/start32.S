/* boot(8) enters an i386 kernel in paged protected mode, on 32-bit arguments, at its physical address. */

    .section .text.start, "ax"
    .globl start
start:
    cli
    leal 4(%esp), %eax /* past the return address */
    call 1f
1:  popl %ecx
    leal stack_top - 1b(%ecx), %esp
    pushl %eax
    call kernel_main

    .bss
    .balign 16
    .skip 4096
stack_top:

    .section .note.GNU-stack, "", @progbits
